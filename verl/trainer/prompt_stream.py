"""The training prompts of a run: batch after batch, epoch after epoch, from wherever the run stands.

In: the training data set. Out: batches of its rows, without end, and the position in them, which checkpoints keep.
"""

from collections.abc import Iterator
from typing import Any

from verl.config import DataConfig
from verl.trainer.checkpoint.layout import DataState
from verl.trainer.data import build_train_loader
from verl.utils.dataset.rl_dataset import RLHFDataset


class PromptStream:
    """Training prompts in an order that depends on ``data.seed`` and the epoch alone.

    Raises:
        ValueError: fewer prompts than one batch takes.
    """

    def __init__(self, dataset: RLHFDataset, config: DataConfig) -> None:
        self._dataset, self._config = dataset, config
        self._loader = build_train_loader(dataset, config)
        self.epoch = 0
        """Passes over the data that are complete."""

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of one pass."""
        return len(self._loader)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches of rows from the current position on; never ends."""
        while True:
            self._dataset.set_epoch(self.epoch)
            yield from self._loader
            self.epoch += 1

    def state(self, kl_coef: float) -> DataState:
        """The position behind the batch that was taken last, and the weight of the KL penalty, kept with it."""
        return self._state(self._loader.state_dict(), kl_coef)

    def fresh_state(self) -> DataState:
        """The state of a stream that nothing was taken from, for comparison with a saved one."""
        return self._state(None, 0.0)

    def load_state(self, state: DataState) -> None:
        """Go on behind the batch that was taken before ``state`` was saved."""
        if state.loader is not None:
            self._loader.load_state_dict(state.loader)
        self.epoch = state.epoch

    def _state(self, loader: dict[str, Any] | None, kl_coef: float) -> DataState:
        return DataState(
            loader=loader,
            epoch=self.epoch,
            prompts=len(self._dataset),
            batch_size=self._config.train_batch_size,
            num_workers=self._config.dataloader_num_workers,
            kl_coef=kl_coef,
        )
