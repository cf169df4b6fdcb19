"""A run that ends before its time: one error in words, what was being done, what would help, and how it goes on.

Vocabulary. A *stage* is what a run is at. *Held* is what lies on the device because something is trained: gradients,
the optimizer's state, the moving average. A *remedy* is flags that are not in use, that go with all the others, and
that need less memory at that stage. Where the bytes that it saves can be read off the models they are told; of
activations, which depend on too much for that, a share at most.
"""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from lpl.autoencoders import decoder_parts, downscaling_factor
from lpl.data.streaming import LostShard
from lpl.data.timeouts import HungLoader
from lpl.diagnosis.needs import DiskNeeds, NoRoom, bytes_of, optimizer_bytes
from lpl.diagnosis.remedies import BYTES_4BIT, NOTICED, Remedy
from lpl.gate import SMALLEST_CROP
from lpl.tools.machine import free_space, has_gpu, is_full, is_out_of_memory, memory_in_words, missing, wanted_memory
from lpl.tools.process import leave
from lpl.tools.words import first_line, size
from lpl.training.checkpoints import find_checkpoints, tidy
from lpl.training.parts import TrainedParts


class Stage(Enum):
    """What a run is at, in words; {} stands for the step."""

    READING = "while flags and data were read"
    LOADING = "while the models were loaded"
    STEP = "in step {}"
    LPL_STEP = "in step {}, which has LPL"
    SAMPLES = "while samples were drawn after step {}"
    LOSSES = "while the validation losses were taken after step {}"
    EVALUATION = "in the evaluation after step {}"
    SAVING = "while the result was saved"


@dataclass
class Status:
    """What a run is doing, for the error that may end it.

    Args:
        accelerator, trained: as soon as they are there.
        step: the one that is taken, or the last one taken.
        started: seconds of the clock.
    """

    args: Namespace
    accelerator: Accelerator | None = None
    trained: TrainedParts | None = None
    stage: Stage = Stage.READING
    step: int = 0
    started: float = field(default_factory=time.time)

    def now(self, stage: Stage, step: int = 0) -> None:
        """Be at that from here on."""
        self.stage, self.step = stage, step

    def why(self, error: Exception) -> str | None:
        """Why the run ends, and how it goes on, if that is known of such an error."""
        if is_out_of_memory(error):
            return self._out_of_memory(error)
        if is_full(error):
            return self._full(error)
        if words := self._loader_ended(error) or self._others_ended(error):
            return words
        if isinstance(error, HungLoader):
            return f"{error}\n{self._how_to_go_on('then')}"
        if isinstance(error, LostShard):
            return f"{error}\n{self._how_to_go_on('when it can be read again')}"
        if isinstance(error, FloatingPointError):  # of weights that are not saved
            return f"{error}\n{self._how_to_go_on('with a lower --learning_rate')}"
        return str(error) if isinstance(error, NoRoom) else None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.accelerator is None else self.accelerator.device

    @property
    def processes(self) -> int:
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def _at(self) -> str:
        return self.stage.value.format(self.step)

    def _out_of_memory(self, error: BaseException) -> str:
        host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        device = torch.device("cpu") if host else self.device
        remedies = [*(self.remedies() if device.type == self.device.type else []), *self._on_host(device)]
        lines = [f"out of memory {self._at()}: {memory_in_words(device)}{wanted_memory(error)}"]
        if remedies:
            lines[0] += "; what saves memory:"
            width = max(len(remedy.flags) for remedy in remedies)
            anew = bool(self._checkpoints())
            lines += [
                f"  {remedy.flags:<{width}}  {remedy}{'; in a new run only' if anew and remedy.anew else ''}"
                for remedy in remedies
            ]
        return "\n".join([*lines, self._how_to_go_on("with such flags" if remedies else "where there is more")])

    def _full(self, error: BaseException) -> str:
        args, folder, name = self.args, self.args.output_dir, getattr(error, "filename", None)
        if self.accelerator is not None and self.accelerator.is_main_process and not args.dry_run:
            tidy(folder)  # what is half-written takes room
        reason = getattr(error, "strerror", None) or first_line(error)
        words = f"{name} cannot be written" if name else f"a file cannot be written {self._at()}"
        words += f": {reason}; {size(free_space(folder))} are free for --output_dir {folder}"
        if self.trained is not None:
            needs = DiskNeeds.of(self.trained, args, self.step, self.step)
            words += f", a checkpoint needs {size(needs.checkpoint)} and the result {size(needs.writing)}"
        limit = "" if args.checkpoints_total_limit else ", or set --checkpoints_total_limit"
        return f"{words}; make room{limit}\n{self._how_to_go_on('then')}"

    def _loader_ended(self, error: BaseException) -> str | None:
        """For a process of the loader that is gone, which the system does where memory is short."""
        said = f"{error} {error.__cause__ or ''}"
        if not isinstance(error, RuntimeError) or not re.search(r"DataLoader worker \(pid", said):
            return None
        if "Bus error" in said:
            words = "a process that loads images ran out of shared memory (/dev/shm; docker has --shm-size for it)"
        elif "Killed" in said:
            words = (
                f"a process that loads images was killed {self._at()}, as the system does where memory runs out; "
                f"{memory_in_words(torch.device('cpu'))}"
            )
        else:
            return None
        fewer = self.args.dataloader_num_workers // 2
        return f"{words}; try --dataloader_num_workers {fewer}\n{self._how_to_go_on('with that')}"

    def _others_ended(self, error: BaseException) -> str | None:
        lost = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
        if self.processes == 1 or not any(words in str(error) for words in lost):
            return None
        return f"another process of the run has ended {self._at()}; its own error says why"

    def _checkpoints(self) -> list[Path]:
        """Those of this run, or of the one that it resumes."""
        resumed = self.args.resume_from_checkpoint is not None
        found = find_checkpoints(self.args.output_dir)
        return [path for path in found if resumed or path.stat().st_mtime >= self.started - 1]

    def _how_to_go_on(self, condition: str) -> str:
        named, last = self.args.resume_from_checkpoint, (self._checkpoints() or [None])[-1]
        if last is not None:
            named = "latest" if last == find_checkpoints(self.args.output_dir)[-1] else last.name
        elif named in (None, "latest", "hub"):
            return "there is no checkpoint of this run to go on from"
        whole = f"{last.name} is whole: " if last else ""
        return f"{whole}{condition} the same command with --resume_from_checkpoint {named} goes on from there"

    # What needs less memory

    def remedies(self) -> list[Remedy]:
        """Those for the device, first the ones under which the numbers of the run stay what they are."""
        if self.stage is Stage.READING:
            return []
        found = [*self._activations(), *self._of_lpl()] if self.trained is not None else []
        found += self._average() + self._precision() + self._training()
        models = 0 if self.trained is None else bytes_of(self.trained.parameters())
        return [remedy for remedy in found if remedy.saved is None or remedy.saved > NOTICED * models]

    @property
    def _in_step(self) -> bool:
        return self.stage in (Stage.STEP, Stage.LPL_STEP)

    @property
    def _has_state(self) -> bool:
        """Whether the optimizer has its state, or is about to get it."""
        return self._in_step or (self.step > 0 and self.stage is not Stage.LOADING)

    def _held(self, parameters: list[nn.Parameter]) -> int:
        """Bytes that lie on the device at this stage because these are trained."""
        args, weights = self.args, bytes_of(parameters)
        held = weights * self._in_step  # their gradients
        held += weights * (self.processes > 1 and self.stage is not Stage.LOADING)  # what the processes exchange
        held += optimizer_bytes(parameters, args) * self._has_state
        return held + weights * (args.use_ema and not (args.offload_ema and self.device.type != "cpu"))

    def _in_half(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes that parameters would need less if they were frozen, in the precision of what is."""
        item = 4 if self.accelerator.mixed_precision == "no" else 2
        return sum(p.numel() * (p.element_size() - item) for p in parameters)

    def _activations(self) -> Iterator[Remedy]:
        args, batch = self.args, self.args.train_batch_size
        if self._in_step and not args.gradient_checkpointing:
            yield Remedy(
                "--gradient_checkpointing",
                "most activations of what is trained, how much is not known before; a step takes about a third longer",
            )
        if batch > 1 and (self._in_step or self.stage is Stage.LOSSES):
            parts = next(count for count in range(2, batch + 1) if batch % count == 0)
            yield Remedy(
                f"--train_batch_size {batch // parts} "
                f"--gradient_accumulation_steps {parts * args.gradient_accumulation_steps}",
                f"{1 - 1 / parts:.0%} of all activations, with as many images per step",
            )
        if args.eval_batch_size > 1 and self.stage is Stage.EVALUATION:
            yield Remedy(f"--eval_batch_size {args.eval_batch_size // 2}", "half of what images need that are drawn")

    def _of_lpl(self) -> Iterator[Remedy]:
        args, batch, in_step = self.args, self.args.train_batch_size, self.stage is Stage.LPL_STEP
        if not in_step and self.stage is not Stage.LOSSES:
            return
        at_once = min(batch, args.lpl_chunk_size or batch, (args.lpl_max_samples if in_step else None) or batch)
        of_decoder = "of the activations of LPL's decoder"
        if in_step and not args.lpl_gradient_checkpointing and self._has_known_parts():
            yield Remedy("--lpl_gradient_checkpointing", f"most {of_decoder}, which then takes longer")
        if at_once > 1:
            share = f"up to {1 - 1 / at_once:.0%} {of_decoder}"
            yield Remedy("--lpl_chunk_size 1", f"{share}, which has {at_once} samples at a time now")
        if at_once > 1 and in_step:
            yield Remedy(f"--lpl_max_samples {at_once // 2}", f"half {of_decoder}, with the same LPL in expectation")
        if in_step and (side := self._smaller_crop()):
            share = 1 - (side / (args.lpl_crop or args.resolution)) ** 2
            yield Remedy(f"--lpl_crop {side}", f"nearly {share:.0%} {of_decoder}, with another LPL (docs/lpl.md)")

    def _has_known_parts(self) -> bool:
        """Whether the decoder that LPL looks through can be computed part by part."""
        if self.args.lpl_vae_name_or_path is not None:
            return False  # nobody knows here
        try:
            return bool(decoder_parts(self.trained.family.vae))
        except ValueError:
            return False

    def _smaller_crop(self) -> int | None:
        """The largest of the crops that are smaller than what LPL looks at."""
        whole, factor = self.args.resolution, downscaling_factor(self.trained.family.vae.config)
        sides = range(SMALLEST_CROP * factor, self.args.lpl_crop or whole, factor)
        return max((side for side in sides if whole % side == 0), default=None)

    def _average(self) -> list[Remedy]:
        args = self.args
        # It is made on the device, and leaves it then.
        if self.stage is Stage.LOADING or not args.use_ema or args.offload_ema or self.device.type == "cpu":
            return []
        return [
            Remedy("--offload_ema", "EMA, which is copied to and fro at each step", bytes_of(self.trained.weights()))
        ]

    def _precision(self) -> list[Remedy]:
        """What may be stored in fewer bits."""
        args, found = self.args, []
        if self.accelerator.mixed_precision == "no" and (self.device.type == "cpu" or torch.cuda.is_bf16_supported()):
            found += self._half_precision()
        if args.optimizer == "AdamW" and not args.use_8bit_adam and not missing("bitsandbytes") and self._has_state:
            trained = self.trained.weights()
            saved = [optimizer_bytes(trained, args.changed(use_8bit_adam=on)) for on in (False, True)]
            found.append(Remedy("--use_8bit_adam", "the optimizer's state", saved[0] - saved[1]))
        may_quantize = args.lora.lora and not args.train_text_encoder and has_gpu() and not missing("bitsandbytes")
        if may_quantize and args.quantize_base != "4bit":
            found.append(Remedy("--quantize_base 4bit", "the frozen denoiser's weights", self._saved_by_4_bits()))
        return found

    def _half_precision(self) -> list[Remedy]:
        flags = "--mixed_precision bf16"
        if self.trained is None:
            return [Remedy(flags, "half of what is frozen, such as text encoders")]
        trained = set(map(id, self.trained.weights()))
        parts = [*self.trained.parts.values(), *self.trained.family.text_encoders]
        frozen = {id(p): p for part in parts for p in part.parameters() if id(p) not in trained}.values()
        saved = sum(p.numel() * 2 for p in frozen if p.dtype == torch.float32)
        if self.stage in (Stage.LOADING, Stage.SAVING):
            return [Remedy(flags, "what is frozen", saved)]
        copies = size(bytes_of(self.trained.weights()) // 2)
        activations = f"about half of the activations of what is trained, for {copies} of copied weights"
        return [Remedy(flags, f"what is frozen, and {activations}", saved) if saved else Remedy(flags, activations)]

    def _saved_by_4_bits(self) -> int | None:
        """Bytes, of the linear layers, which alone are packed."""
        if self.trained is None:
            return None
        layers = (module for module in self.trained.denoiser.modules() if isinstance(module, nn.Linear))
        frozen = (layer.weight for layer in layers if not layer.weight.requires_grad)
        return int(sum(weight.numel() * (weight.element_size() - BYTES_4BIT) for weight in frozen))

    def _training(self) -> list[Remedy]:
        """Training less."""
        args, found = self.args, []
        if args.train_text_encoder and self.trained is not None:
            encoders = self.trained.parameters_of(*self.trained.text_encoders)
            saved = self._held(encoders) + (bytes_of(encoders) if args.lora.lora else self._in_half(encoders))
            found.append(
                Remedy("without --train_text_encoder", "what its training needs, activations not counted", saved)
            )
        if not args.lora.lora and not args.from_scratch:
            what = "what training all weights needs, less what training the adapters does"
            if self.trained is None:
                in_half = self.accelerator.mixed_precision != "no"
                return [*found, *([Remedy("--lora", "half of the denoiser's weights")] if in_half else [])]
            trained = self.trained.weights()
            found.append(Remedy("--lora", what, self._held(trained) + self._in_half(trained)))
        return found

    def _on_host(self, device: torch.device) -> Iterator[Remedy]:
        """Of the machine's own memory."""
        args = self.args
        if device.type == "cpu" and args.dataloader_num_workers and self.stage not in (Stage.READING, Stage.LOADING):
            yield Remedy(
                f"--dataloader_num_workers {args.dataloader_num_workers // 2}",
                "processes that load images, and the batches that they have ready",
            )
        if device.type != self.device.type and args.offload_ema and args.use_ema and self.trained is not None:
            yield Remedy("without --offload_ema", "EMA, which then is on the device", bytes_of(self.trained.weights()))


@contextmanager
def explained(script: str, args: Namespace) -> Iterator[Status]:
    """Within, what a run runs out of ends it with a few words and exit code 1, not with a traceback.

    One process of several leaves at once, since to end in order it would wait for the others, who wait for it; their
    launcher ends them.
    """
    status = Status(args)
    try:
        yield status
    except Exception as error:
        words = status.why(error)
        if words is None:
            raise
        words = f"{script}: error: {words}"
        if status.stage not in (Stage.READING, Stage.LOADING):
            print(file=sys.stderr)  # below the bar
        if status.processes == 1:
            sys.exit(words)
        number = status.accelerator.process_index
        print(f"{words}\nthis was process {number} of 0 to {status.processes - 1}", file=sys.stderr, flush=True)
        leave(1)
