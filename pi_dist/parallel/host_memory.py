"""Tensors that leave the device for host memory while nobody needs them, and come back ahead of need.

Copies run on a stream of their own, one after the other, beside the work. So a buffer of host memory may be
given away while it is still being read: whatever is written to it next waits in the same stream.
"""

from __future__ import annotations

from collections import defaultdict

import torch

_SLAB_BYTES = 2**16  # the least that is asked for at once
_BUFFERS = 8  # that a slab holds at least: as pinned memory comes in powers of two, under 1/9 is left over


def slab_bytes(size: int) -> int:
    """Of the memory that is asked for at once for buffers of `size` bytes: as many of them as fit."""
    return max(_SLAB_BYTES, 1 << (_BUFFERS * size - 1).bit_length())


class HostMemory:
    """Buffers of host memory, pinned where the device is a GPU, and the stream that fills and reads them.

    What is given back is used again, so that after the first step nothing is pinned any more. Not for several
    threads.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[torch.Tensor]] = defaultdict(list)
        self._stream: torch.cuda.Stream | None = None

    def store(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start to copy a contiguous tensor into a buffer.

        Returns the buffer, of its shape, and what to wait for before the tensor changes or is let go.
        """
        size, pinned = tensor.numel() * tensor.element_size(), tensor.is_cuda
        free = self._free[size, pinned]
        if not free:
            slab = torch.empty(slab_bytes(size), dtype=torch.uint8, pin_memory=pinned)
            free += slab[: len(slab) // size * size].split(size)
        buffer = free.pop().view(tensor.dtype).view(tensor.shape)
        return buffer, self._copy(buffer, tensor, tensor.device)

    def load(
        self, buffer: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start to copy a buffer to a new tensor on the device; also returns what to wait for first."""
        tensor = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        return tensor, self._copy(tensor, buffer, device)

    def give_back(self, buffer: torch.Tensor) -> None:
        """A buffer that nobody will load again."""
        flat = buffer.flatten().view(torch.uint8)
        self._free[flat.numel(), flat.is_pinned()].append(flat)

    def _copy(
        self, target: torch.Tensor, source: torch.Tensor, device: torch.device
    ) -> torch.cuda.Event | None:
        if device.type != "cuda":
            target.copy_(source)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        # the source is computed, or the target's memory was used before, by what is queued now
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


def inputs_in_host_memory(memory: HostMemory) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which tensors that autograd saves go to host memory until the backward pass.

    For a chain, such as the inputs of checkpointed blocks: when one is needed, that before it is fetched.
    Each is given out once.
    """
    saved: list[Movable] = []

    def pack(tensor: torch.Tensor) -> int:
        saved.append(Movable(tensor.contiguous(), memory))
        saved[-1].save()
        if len(saved) > 1:
            saved[-2].leave()
        return len(saved) - 1

    def unpack(number: int) -> torch.Tensor:
        tensor = saved[number].get()
        saved[number].forget()
        if number > 0:
            saved[number - 1].fetch()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Movable:
    """A tensor that is on its device, in host memory, or in both.

    The device's copy is let go only after its stream waits for what copies it, so its memory can be used
    again at once.

    Args:
        memory: where it goes; None: it stays.
    """

    def __init__(self, tensor: torch.Tensor, memory: HostMemory | None) -> None:
        self._memory, self._device = memory, tensor.device
        self._here: torch.Tensor | None = tensor
        self._there: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def get(self) -> torch.Tensor:
        """The tensor on its device, not to be changed."""
        self.fetch()
        self._wait()
        return self._here

    def get_to_change(self) -> torch.Tensor:
        """The tensor on its device; what lies in host memory is then not it any more."""
        tensor = self.get()
        self._give_back()
        return tensor

    def fetch(self) -> None:
        """Start to bring it to its device."""
        if self._here is None:
            self._here, self._copied = self._memory.load(self._there, self._device)

    def save(self) -> None:
        """Start to copy it to host memory."""
        if self._there is None:
            self._there, self._copied = self._memory.store(self._here)

    def leave(self) -> None:
        """Let go of the device's copy of what was saved."""
        self._wait()
        self._here = None

    def forget(self) -> None:
        """Let go of both."""
        self.leave()
        self._give_back()

    def held(self) -> list[torch.Tensor]:
        """What of it there is, the device's copy first."""
        return [x for x in (self._here, self._there) if x is not None]

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None

    def _give_back(self) -> None:
        if self._there is not None:
            self._memory.give_back(self._there)
            self._there = None
