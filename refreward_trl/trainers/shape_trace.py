"""Runs code on tensors that have shapes but no content, and counts what it would take: live bytes, work, traffic.

Networks are built without weights, their parameters become fake tensors, and the very code that trains is run on them.
Tensors that depend on no weight and no image (token ids, positions, noise) stay real, so that code may read them; what
it reads of a fake tensor is a neutral value: true, 0, or 0.5.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PAGE = 64
"""Bytes to a multiple of which the CPU's allocator rounds up."""

MAPPED = 32 * 2**20
"""Bytes of a block above which glibc always gives it back to the system (DEFAULT_MMAP_THRESHOLD_MAX)."""
BUFFERS = "working memory of convolutions"
BLOCK = 16
"""Channels to a multiple of which the CPU's convolutions fill up an image."""
PLAIN_CHANNELS = 3
"""Up to so many channels they read an image as it is."""

_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)
_NEUTRAL = {torch.bool: True}


@dataclass
class Work:
    """What a piece of code computes.

    Attributes:
        convolution: Floating point operations of convolutions.
        matrix: The same of matrix products and attention.
        traffic: Bytes that all other operations read and write.
        operations: How many kernels were started.
    """

    convolution: float = 0.0
    matrix: float = 0.0
    traffic: float = 0.0
    operations: int = 0


@dataclass
class Peak:
    """The moment of most memory.

    Attributes:
        size: Bytes above those that were live at the start.
        parts: The same by what was running when they were taken.
        small: The most bytes in blocks of at most `MAPPED`, at any moment.
        large: The same in larger blocks.
    """

    size: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    small: int = 0
    large: int = 0


def without_content(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replaces every parameter and buffer by a fake one of its shape and dtype, in place; they may be on `meta`.

    Buffers that hold numbers already, such as rotary frequencies, are replaced too: nothing reads them.
    """
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        # A fake tensor is nowhere, and modules cannot replace it: they stay on their device and keep their dtype.
        module._apply = MethodType(_stay, module)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                fake = empty(parameter, mode)
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = empty(buffer, mode)
    return network


def _stay(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    return module


def empty(like: Tensor, mode: FakeTensorMode) -> Tensor:
    """Returns a fake tensor of the same shape and dtype, on the CPU."""
    with mode:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")


class ShapeTrace(TorchDispatchMode):
    """Inside, everything that is computed is counted; `peak` and `work` have the result.

    Args:
        conv_buffers: Count what the CPU's convolutions take while they run: copies of what they read and write, in
            blocks of 16 channels.
    """

    def __init__(self, *, conv_buffers: bool = True) -> None:
        super().__init__()
        self.peak = Peak()
        self.work = Work()
        self.live = 0
        self.label = "other"
        self._conv_buffers = conv_buffers
        self._parts: Counter[str] = Counter()
        self._held: dict[int, tuple[int, str]] = {}
        self._large = 0

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Inside, what is taken is counted under `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    @contextmanager
    def naming(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, what the forward pass of a module takes is counted under its name."""
        handles = []
        outer: list[str] = []
        for name, module in modules.items():

            def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
                outer.append(self.label)
                self.label = name

            def leave(module: nn.Module, inputs: Any, output: Any) -> None:
                self.label = outer.pop()

            handles += [module.register_forward_pre_hook(enter)]
            handles += [module.register_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hold(self, tensor: Tensor) -> None:
        """Counts the memory of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = -(-storage.nbytes() // PAGE) * PAGE
        self._held[key] = (size, self.label)
        self._take(size, self.label)
        weakref.finalize(storage, self._free, key).atexit = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = _answer(func, args)
        if answer is not None:
            return answer[0]
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _unmasked(args[1]))
        output = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        borrowed: list[int] = []
        if self._conv_buffers and func._overloadpacket in _CONVOLUTIONS:
            before, borrowed = _conv_buffers(func, args, output)
            for size in (*before, *borrowed):
                self._take(size, BUFFERS)
            for size in before:
                self._give(size, BUFFERS)
        own = {tensor.untyped_storage()._cdata for tensor in read}
        fresh = [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in own]
        for tensor in fresh:
            self.hold(tensor)
        if fresh or func._schema.is_mutable:  # everything else is a view
            self._count(func, args, kwargs, output, [*read, *tensors])
        for size in borrowed:
            self._give(size, BUFFERS)
        return output

    def _count(self, func: Any, args: Any, kwargs: Any, output: Any, tensors: list[Tensor]) -> None:
        self.work.operations += 1
        packet = func._overloadpacket
        if packet not in flop_registry:
            self.work.traffic += sum(map(_size, tensors))
            return
        operations = float(flop_registry[packet](*args, **kwargs, out_val=output))
        if packet in _CONVOLUTIONS:
            self.work.convolution += operations
        else:
            self.work.matrix += operations

    def _take(self, size: int, label: str) -> None:
        self._parts[label] += size
        self.live += size
        if size > MAPPED:
            self._large += size
        peak = self.peak
        peak.small = max(peak.small, self.live - self._large)
        peak.large = max(peak.large, self._large)
        if self.live > peak.size:
            peak.size, peak.parts = self.live, dict(self._parts)

    def _give(self, size: int, label: str) -> None:
        self._parts[label] -= size
        self.live -= size
        if size > MAPPED:
            self._large -= size

    def _free(self, key: int) -> None:
        self._give(*self._held.pop(key))


def _answer(func: Any, args: tuple[Any, ...]) -> tuple[Any] | None:
    """Returns what code learns that asks a tensor without content for a number; None for every other operation."""
    if not (args and isinstance(args[0], FakeTensor)):
        return None
    tensor = args[0]
    if func is torch.ops.aten._local_scalar_dense.default:
        return (_NEUTRAL.get(tensor.dtype, 0.5 if tensor.is_floating_point() else 0),)
    if func is torch.ops.aten.nonzero.default:
        return (torch.zeros(0, tensor.ndim, dtype=torch.long),)
    if func is torch.ops.aten.equal.default:
        return (True,)
    return None


def _unmasked(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replaces masks without content, which could choose any number of entries, by the places of all entries."""
    places: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, FakeTensor) and index.dtype is torch.bool:
            places += torch.ones(index.shape, dtype=torch.bool).nonzero(as_tuple=True)
        else:
            places.append(index)
    return places


def _conv_buffers(func: Any, args: tuple[Any, ...], output: Any) -> tuple[list[int], list[int]]:
    """Returns the sizes of the blocks that oneDNN takes for a convolution, as measured on single layers: those that it
    gives back before its result is allocated, and those that it keeps beside the result."""
    backward = func._overloadpacket is torch.ops.aten.convolution_backward
    image, kernel = (args[1], args[2]) if backward else (args[0], args[1])
    if image.ndim != 4 or (not backward and kernel.shape[2:].numel() == 1):
        return [], []
    if not backward:
        plain = image.shape[1] <= PLAIN_CHANNELS and args[8] == 1
        return ([] if plain else [_blocked(image)]), [_blocked(output)]
    gradient, (for_image, for_kernel, _) = args[0], args[-1]
    first = [_blocked(gradient), _blocked(image)] if for_image and for_kernel else [_blocked(gradient)]
    return first, [_blocked(image)]


def _blocked(image: Tensor) -> int:
    count, channels, *sides = image.shape
    return count * -(-channels // BLOCK) * BLOCK * math.prod(sides) * image.element_size()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
