"""An autoencoder of handwritten digits, trained by several processes:

    torchrun --standalone --nproc-per-node 2 examples/autoencoder_ddp.py

Nothing here is special to KFQN: wrapper, sampler and loop are those of any optimizer. Two processes take the steps that
one takes with mini-batches of twice the size.
"""

import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kfqn_core import KFQN
from kfqn_core.lab.problems import digits_autoencoder


def main(epochs: int = 20) -> None:
    distributed.init_process_group("gloo")
    problem = digits_autoencoder()
    model = DistributedDataParallel(problem.model(seed=0))
    optimizer = KFQN(model, lr=0.03)
    data = TensorDataset(problem.x_train)
    sampler = DistributedSampler(data, drop_last=True)  # every rank gets the same number of mini-batches
    loader = DataLoader(data, problem.batch_size // distributed.get_world_size(), sampler=sampler, drop_last=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for (x,) in loader:
            optimizer.zero_grad()
            problem.loss(model(x), x).backward()  # a mean over this rank's samples
            optimizer.step()
            schedule.step()
        if distributed.get_rank() == 0:
            with torch.no_grad():
                loss = problem.loss(model.module(problem.x_test), problem.x_test)
            print(f"epoch {epoch + 1}: loss on test images {loss:.5f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
