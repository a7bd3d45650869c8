"""Say which base this is, and in which part another one differs.

Two levels. `structure` covers the config and the tensors' names and shapes; it's instant.
The content digests cover every weight byte, the tokenizer and the chat template.
A weight's digest is kept by its file's path, size and time, so each file is read once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasmith.bases.headers import TensorHeader, read_file_headers, read_headers, weight_files
from lorasmith.errors import BaseNotFoundError, ConfigError
from lorasmith.native import home

from . import cache

# Keys that say where a config came from or how it was loaded, not which model it describes.
VOLATILE_KEYS = frozenset(
    {"_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype"}
)
# What a tokenizer.json holds of the last call's settings, not of the vocabulary.
CALL_STATE_KEYS = frozenset({"truncation", "padding"})
# Tokenizers older than tokenizer.json.
SLOW_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
SEQUENCE_KEYS = ("bos_token", "eos_token", "add_bos_token", "add_eos_token")
# File systems stamp times in ticks of milliseconds (FAT: 2 s); two writes in one tick look the same.
SETTLED_NS = 3_000_000_000
PARTS = {
    "structure": "the structure (config, or tensor names and shapes)",
    "weights": "the weights",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
}


@dataclass(frozen=True)
class Fingerprint:
    """Hexadecimal sha256 of each part of a base; equal parts are the same part.

    Attributes:
        quantised: the format that its linear layers were put into on loading; empty for none.
    """

    structure: str
    weights: str
    tokenizer: str
    chat_template: str
    quantised: str = ""

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the sha256 over all parts, for names and tables."""
        return _digest(self.to_dict())[:16]

    def differences(self, other: Fingerprint) -> list[str]:
        """Return what differs, in plain words; an empty list means the same base."""
        found = [words for part, words in PARTS.items() if getattr(self, part) != getattr(other, part)]
        if self.quantised != other.quantised:
            found.append(
                f"the quantisation ({self.quantised or 'none'} there, {other.quantised or 'none'} here)"
            )
        return found

    def to_dict(self) -> dict[str, str]:
        """Return the four parts, and the quantisation if there is one, for a sidecar file."""
        return {part: value for part, value in asdict(self).items() if part in PARTS or value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fingerprint:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: A part is missing or is no text.
        """
        quantised = values.get("quantised", "")
        bad = [part for part in PARTS if not isinstance(values.get(part), str)]
        bad += [] if isinstance(quantised, str) else ["quantised"]
        if bad:
            raise ConfigError(f"this is no base fingerprint: {', '.join(bad)} missing or not text.")
        return cls(**{part: values[part] for part in PARTS}, quantised=quantised)


def fingerprint_directory(directory: str | Path, *, quantised: str | None = None) -> Fingerprint:
    """Return the fingerprint of a model directory; weight files not seen before are read once.

    Args:
        quantised: the format that its linear layers are put into on loading.

    Raises:
        BaseNotFoundError: A file is missing or damaged.
    """
    directory = Path(directory)
    return Fingerprint(
        structure=_structure(directory),
        weights=_weights(directory),
        tokenizer=_tokenizer(directory),
        chat_template=_chat_template(directory),
        quantised=quantised or "",
    )


def _structure(directory: Path) -> str:
    shapes = {name: header.shape for name, header in read_headers(directory).items()}
    return _digest([_without(_read_json(directory / "config.json"), VOLATILE_KEYS), shapes])


def _weights(directory: Path) -> str:
    """Digest over the tensors' own digests, so that other shards of the same weights change nothing."""
    return _digest(_digests(weight_files(directory), _hash_tensors))


def _digests(files: Iterable[Path], compute: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """Return `compute` over all files, from the kept digests where a file was seen before."""
    known = _load_known()
    keys = {path: _file_key(path) for path in files}
    fresh = {key: compute(path) for path, key in keys.items() if not isinstance(known.get(key), dict)}
    if settled := {key: digests for key, digests in fresh.items() if _is_settled(key)}:
        _remember(settled)
    known |= fresh
    return {name: digest for key in keys.values() for name, digest in known[key].items()}


def _hash_tensors(path: Path) -> dict[str, str]:
    """Hash each tensor through one small buffer; memory stays flat whatever the file's size."""
    with path.open("rb", buffering=0) as file:
        return {name: _hash_tensor(file, header) for name, header in sorted(read_file_headers(path).items())}


def _hash_tensor(file: Any, header: TensorHeader) -> str:
    digest = hashlib.sha256(f"{header.dtype} {list(header.shape)} ".encode())
    file.seek(header.begin)
    buffer = memoryview(bytearray(min(cache.CHUNK_BYTES, header.end - header.begin)))
    left = header.end - header.begin
    while left:
        count = file.readinto(buffer[:left])
        if not count:
            raise BaseNotFoundError(f"{header.file} ended while it was read; is another program writing it?")
        digest.update(buffer[:count])
        left -= count
    return digest.hexdigest()


def _tokenizer(directory: Path) -> str:
    config = _read_json(directory / "tokenizer_config.json", {})
    ends = {key: _token_text(config.get(key)) for key in SEQUENCE_KEYS}
    if (directory / "tokenizer.json").is_file():
        return _digest([_digests([directory / "tokenizer.json"], _hash_tokenizer), ends])
    slow = (directory / name for name in SLOW_TOKENIZER_FILES)
    return _digest([{path.name: cache.sha256_file(path) for path in slow if path.is_file()}, ends])


def _hash_tokenizer(path: Path) -> dict[str, str]:
    return {"tokenizer.json": _digest(_without(_read_json(path), CALL_STATE_KEYS, deep=False))}


def _chat_template(directory: Path) -> str:
    """Digest of the template's text, wherever it is kept; of nothing where there is none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _digest(file.read_text(encoding="utf-8"))
    return _digest(_read_json(directory / "tokenizer_config.json", {}).get("chat_template"))


def _token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _without(value: Any, keys: frozenset[str], *, deep: bool = True) -> Any:
    if isinstance(value, list) and deep:
        return [_without(item, keys) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _without(item, keys) if deep else item for key, item in value.items() if key not in keys}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read_json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseNotFoundError(f"{path} cannot be read: {error}.") from error


def _file_key(path: Path) -> str:
    stat = path.resolve().stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def _is_settled(key: str) -> bool:
    """Say whether the file was left alone long enough for its time to tell the next change from this one."""
    return time.time_ns() - int(key.rsplit("|", 1)[1]) > SETTLED_NS


def _key_path(key: str) -> str:
    return key.rsplit("|", 2)[0]


def _known_path() -> Path:
    return home() / "fingerprints.json"


def _load_known() -> dict[str, dict[str, str]]:
    """Return digests kept by earlier runs; a damaged or absent file only costs reading the weights again."""
    try:
        known = json.loads(_known_path().read_text())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _remember(fresh: dict[str, dict[str, str]]) -> None:
    """Add to the kept digests. A cache that can't be written is no reason to fail: it's only slower."""
    path = _known_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replaced = {_key_path(key) for key in fresh}
        known = {key: value for key, value in _load_known().items() if _key_path(key) not in replaced}
        cache.write_json(path, {k: v for k, v in known.items() if Path(_key_path(k)).is_file()} | fresh)
    except OSError:
        return
