"""A student's worker group that does nothing but save, and the driver's state beside it."""

from pathlib import Path

from verl.workers.fsdp.checkpoint import SaveOutcome

DRIVER_STATE = {"loader": {"batch": 3}, "epoch": 1, "kl_coef": 0.5, "metrics": {}}


class FakeRanks:
    """Two ranks that write a file each, and an export that names its step."""

    def __init__(self, num_bytes: int = 10) -> None:
        self.num_bytes = num_bytes
        self.slow = False
        """Whether rank 1 is never done unless somebody waits for it."""
        self.error = ""
        """Why rank 1 fails."""
        self.folder, self.step = Path(), 0

    def begin_checkpoint(self, local_path: str, global_step: int) -> None:
        self.folder, self.step = Path(local_path), global_step

    def checkpoint_outcome(self, wait: bool) -> list[SaveOutcome]:
        if self.slow and not wait:
            return [SaveOutcome(done=True, seconds=1.0), SaveOutcome(done=False)]
        return [SaveOutcome(done=True, seconds=2.0), self._write()]

    def _write(self) -> SaveOutcome:
        try:
            (self.folder / "huggingface").mkdir(exist_ok=True)
            (self.folder / "huggingface" / "model.safetensors").write_text(f"weights of step {self.step}")
            for rank in range(2):
                (self.folder / f"shard_{rank}").write_bytes(b"x" * self.num_bytes)
        except OSError as error:
            return SaveOutcome(done=True, error=f"OSError: {error}")
        return SaveOutcome(done=True, error=self.error, seconds=3.0)
