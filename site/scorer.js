// The ledger names everything in the book: what it says of a word comes after what a chapter says.
var Scorer = {
  score: ([docname, title, anchor, descr, score]) => (docname === "ledger" ? score - 100 : score),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
