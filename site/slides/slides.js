// Formulas are set first, then every slide is made to fit, then reveal.js takes over.
const WIDTH = 1280, HEIGHT = 720, PADDING = 40, SMALLEST = 0.45;

// The size at which `fits` holds, or the smallest.
function shrink(element, name, fits) {
  for (let size = 1; !fits() && size > SMALLEST; size -= 0.05) element.style.setProperty(name, (size - 0.05).toFixed(2));
}

function fit(slide) {
  // A wide formula alone becomes smaller, not the words around it.
  const edge = slide.getBoundingClientRect().right - PADDING;
  for (const box of slide.querySelectorAll('mjx-container[display="true"], pre')) {
    shrink(box, "--own", () => box.getBoundingClientRect().left + box.scrollWidth <= edge + 1);
  }
  shrink(slide, "--fit", () => slide.scrollHeight <= HEIGHT && slide.scrollWidth <= slide.clientWidth);
}

async function start() {
  await MathJax.startup.promise;
  await MathJax.typesetPromise();
  // Laid out at the size of a slide, whatever the window's; fonts are loaded once something is shown in them.
  document.querySelector(".slides").style.width = `${WIDTH}px`;
  const sections = document.querySelectorAll(".slides section");
  for (const section of sections) section.style.display = "block";
  await new Promise(requestAnimationFrame);
  await document.fonts.ready;
  document.querySelectorAll(".slides .slide").forEach(fit);
  for (const section of sections) section.style.removeProperty("display");
  await Reveal.initialize({
    width: WIDTH, height: HEIGHT, margin: 0.02, hash: true, slideNumber: "c/t", transition: "none", center: false,
  });
  document.body.dataset.ready = "yes";
}
start();
