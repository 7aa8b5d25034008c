"""The pickle of a PyTorch file that holds named tensors, read without running it.

A pickle is a program for a machine with a stack. Python's own machine calls whatever the program
names, and some of its instructions take memory or time that the size of the file does not bound
(a memo index of 2**31, hashing a tuple that holds itself a million times over). This reader takes
the instructions from :mod:`pickletools`, which executes nothing, and gives a meaning only to those
that a file of plain tensors needs. Values are never hashed, compared or printed, so everything
takes time and memory in proportion to the file.
"""

from __future__ import annotations

import dataclasses
import pickletools
from typing import Any, NoReturn

from catversion_jax.errors import CatVersionError

MAX_PICKLE_BYTES = 256 * 1024
"""Of the instructions; those of the authors' adapters are 2 kB."""

_MAX_AXES = 8
_MAX_LENGTH = 2**40  # of one axis: more than any file holds
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_DICTIONARY = ("collections", "OrderedDict")
_STORAGE = ("torch", "FloatStorage")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
_PUT, _GET = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_MARK = object()


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """What ``torch._utils._rebuild_tensor_v2`` would have built: a view of a stored vector."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Storage:
    name: str


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name that the pickle asks for, one of the three that are known; it is never looked up."""

    module: str
    name: str


def read_named_tensors(data: bytes, source: str) -> dict[str, StoredTensor]:
    """The tensors that a pickle names, by key; none of their numbers is read.

    Args:
      data: the pickle, ``data.pkl`` of PyTorch's zip file.
      source: what to call it in messages.

    Raises:
      CatVersionError: it asks for anything that a table of float32 tensors does not need, or is
        damaged. Nothing in it was run.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CatVersionError(
            f"{source}: its pickle is {len(data)} bytes, an adapter's at most {MAX_PICKLE_BYTES}. "
            "Not an adapter file."
        )
    try:
        content = _Machine(source).run(data)
    except CatVersionError:
        raise
    except Exception as error:  # a damaged pickle may raise anything, and none of it is ours
        raise CatVersionError(
            f"{source}: its pickle is damaged ({type(error).__name__}: {error!s:.80}). Download "
            "it again."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(tensor, StoredTensor) for tensor in content.values()
    ):
        raise CatVersionError(
            f"{source}: not a table of named tensors. Give the adapter's pytorch_adapter.bin."
        )
    return content


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """The value that the pickle leaves on the stack.

        Raises:
          CatVersionError: an instruction, a name or an argument that is not needed.
          LookupError, ValueError: the pickle is damaged.
        """
        for instruction, argument, _ in pickletools.genops(data):
            self._step(instruction.name, argument)
        (content,) = self._stack
        return content

    def _step(self, name: str, argument: Any) -> None:
        stack, memo = self._stack, self._memo
        if name in ("PROTO", "FRAME", "STOP"):
            return
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _PUT:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "DICT"):
            pairs = self._popped_to_mark() if name == "DICT" else []
            stack.append({})
            self._set(pairs)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set([key, value])
        elif name == "SETITEMS":
            self._set(self._popped_to_mark())
        elif name == "TUPLE":
            stack.append(tuple(self._popped_to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise ValueError("the stack is too short")
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(self._known(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._known(module, attribute))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._built(function, arguments))
        elif name == "BUILD":  # the versions of a state dict's modules; not needed
            stack.pop()
        else:
            self._refuse(f"uses the instruction {name}")

    def _popped_to_mark(self) -> list[Any]:
        popped: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            popped.append(value)
        return popped[::-1]

    def _set(self, pairs: list[Any]) -> None:
        """Put keys and values, in turn, into the dictionary on top of the stack."""
        target = self._stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in pairs[::2]):
            self._refuse("fills something else than a table with texts as keys")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def _known(self, module: Any, name: Any) -> _Name:
        if not isinstance(module, str) or not isinstance(name, str):
            self._refuse("asks for a name that is not text")
        if (module, name) in (_TENSOR, _DICTIONARY, _STORAGE):
            return _Name(module, name)
        if module == "torch" and name.endswith("Storage"):
            raise CatVersionError(
                f"{self._source}: numbers stored as torch.{name:.40}; must be float32. Convert "
                "them with .float()."
            )
        self._refuse(f"asks for {module:.80}.{name:.80}")

    def _storage(self, identity: Any) -> _Storage:
        """``("storage", torch.FloatStorage, key, location, size)``."""
        if not (
            isinstance(identity, tuple)
            and len(identity) >= 3
            and isinstance(identity[0], str)
            and identity[0] == "storage"
            and identity[1] == _Name(*_STORAGE)
            and isinstance(identity[2], str)
        ):
            raise CatVersionError(
                f"{self._source}: a persistent id that is not a float32 storage. Not an adapter "
                "file."
            )
        return _Storage(identity[2])

    def _built(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            self._refuse("calls something that is not a name")
        if function == _Name(*_DICTIONARY) and not arguments:
            return {}
        if function == _Name(*_TENSOR) and len(arguments) >= 4:
            storage, offset, shape, stride = arguments[:4]
            lengths = (shape, stride, (offset,))
            if isinstance(storage, _Storage) and all(map(_are_lengths, lengths)):
                return StoredTensor(storage.name, offset, shape, stride)
        self._refuse("calls a known name with other arguments than a tensor has")

    def _refuse(self, what: str) -> NoReturn:
        raise CatVersionError(
            f"{self._source}: the pickle {what}, which a file of plain tensors never needs; "
            "refused, nothing was run. Do not open this file with torch.load either unless you "
            "trust its source."
        )


def _are_lengths(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= _MAX_AXES
        and all(type(value) is int and 0 <= value < _MAX_LENGTH for value in values)
    )
