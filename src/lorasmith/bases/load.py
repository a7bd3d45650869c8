"""Resolve a name to a directory, and load a frozen model and its tokenizer from there."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.bases.builtin import BUILTINS, builtin_directory
from lorasmith.bases.fingerprint import Fingerprint, fingerprint_directory
from lorasmith.bases.headers import read_headers
from lorasmith.errors import BaseMismatchError, BaseNotFoundError, ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
    "fp64": "float64",
    "float64": "float64",
}
# x86 with AVX-512 or AMX, and Arm (whose flag is plain "bf16"): a matrix product in hardware.
CPU_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(eq=False)
class Base:
    """A frozen model in eval mode, with what is needed to talk to it.

    Attributes:
        quantised: the format of its linear layers, `"nf4"` or `"int8"`; None for plain ones.
    """

    model: Any
    tokenizer: Any
    name: str
    stop_token_ids: tuple[int, ...]
    directory: Path | None
    dtype_reason: str = ""
    quantised: str | None = None

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Digest of config, weights, tokenizer and chat template; the first use reads every byte once."""
        if self.directory is None:
            raise BaseNotFoundError(f"{self.name} did not come from a directory, so it has no fingerprint.")
        return fingerprint_directory(self.directory, quantised=self.quantised)


def load_base(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantize: str | None = None,
) -> Base:
    """Load a frozen base: a local directory, a built-in name, or a hub id, tried in that order.

    Args:
        name: Weights are read from safetensors only, and no code from the directory is run.
        dtype: `"auto"` is bf16 where `device` multiplies it in hardware, else fp32.
        device: Where the model goes.
        quantize: `"nf4"` or `"int8"`: the linear layers, all but the output head, keep codes instead of
            weights, one layer at a time, so that there is never a whole model in `dtype`.

    Raises:
        BaseNotFoundError: The name leads nowhere, or what it leads to is incomplete or damaged.
        ConfigError: The dtype or the quantisation is unknown.
        OutputError: The cache folder, which a built-in needs, cannot be written.
    """
    chosen = pick_dtype(dtype, device)
    if quantize is not None:
        from lorasmith.bases.quantise import quantise_base
        from lorasmith.quantised import require_kind

        require_kind(quantize)
    directory = _resolve(name)
    _check_directory(directory)
    with quiet():
        tokenizer = _load_tokenizer(directory)
        model = _load_model(directory, chosen if quantize is None else "auto")
    reason = dtype_reason(dtype, device)
    if quantize is not None:
        reason += f"; {quantise_base(model, quantize, chosen)}"
    _note_files(model, directory)
    model.to(device).eval().requires_grad_(False)
    stops = _stop_token_ids(model, tokenizer)
    return Base(model, tokenizer, str(name), stops, directory, reason, quantize)


def match_base(provenance: Mapping[str, Any], fingerprint: Fingerprint) -> bool | None:
    """Whether an adapter's sidecar names this base; None where it names none (another tool's adapter).

    Raises:
        ConfigError: it names one in a form that nobody writes.
    """
    base = provenance.get("base")
    noted = base.get("fingerprint") if isinstance(base, Mapping) else base
    if noted is None:
        return None
    values = dict(noted) if isinstance(noted, Mapping) else {}
    return not Fingerprint.from_dict(values).differences(fingerprint)


def require_base(provenance: Mapping[str, Any], base: Base) -> None:
    """Refuse an adapter that was trained on another base.

    Raises:
        BaseMismatchError: naming what differs.
    """
    if match_base(provenance, base.fingerprint) is False:
        noted = provenance["base"]
        differences = Fingerprint.from_dict(noted["fingerprint"]).differences(base.fingerprint)
        raise BaseMismatchError(
            f'The adapter was trained on "{noted.get("name", "a base")}", and {base.name} differs in: '
            f"{', '.join(differences)}.\n  Load the base it was trained on, or, if you know that they agree, "
            "pass --allow-base-mismatch."
        )


def base_directory(name: str | Path) -> Path:
    """Return the directory that `name` means, checked but with nothing loaded.

    Raises:
        BaseNotFoundError: as `load_base`.
    """
    directory = _resolve(name)
    _check_directory(directory)
    return directory


def load_tokenizer(name: str | Path) -> Any:
    """Load a base's tokenizer alone.

    Raises:
        BaseNotFoundError: as `load_base`.
    """
    with quiet():
        return _load_tokenizer(base_directory(name))


def pick_dtype(dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> torch.dtype:
    """Return the torch dtype that `dtype` means on `device`.

    Raises:
        ConfigError: It is neither a floating torch dtype nor one of the known names.
    """
    return _choose_dtype(dtype, device)[0]


def dtype_reason(dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> str:
    """Say in one line which dtype `pick_dtype` returns and why, as it will be printed."""
    chosen, reason = _choose_dtype(dtype, device)
    return f"{str(chosen).removeprefix('torch.')}: {reason}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' progress bars, advice and Python warnings; restore the settings on exit."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def write_base(base: Base, directory: Path) -> None:
    """Write model and tokenizer into `directory` in the form that `load_base` reads, without a word."""
    with quiet():
        base.model.save_pretrained(directory)
        base.tokenizer.save_pretrained(directory)


def _resolve(name: str | Path) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise BaseNotFoundError(
            f"{path} is a file; a base is a directory with config.json and *.safetensors."
        )
    if isinstance(name, Path) or path.is_absolute() or name.startswith((".", "~")):
        raise BaseNotFoundError(f"there is no directory {path}.")
    return builtin_directory(name) if name in BUILTINS else _hub_directory(name)


def _hub_directory(name: str) -> Path:
    """Return the snapshot folder of a hub id, downloaded where it isn't cached yet."""
    import huggingface_hub

    try:
        # No sub-folders: some hold a second copy of the weights in another format.
        found = huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseNotFoundError(
            f'no base "{name}".{did_you_mean(name, BUILTINS)}\n'
            f"  it is not a directory here, and not a built-in ({', '.join(BUILTINS)});\n"
            f"  on the model hub: {said}\n"
            "  give a local model directory, a built-in name, or an id on a hub that this machine reaches."
        ) from error
    return Path(found)


def _check_directory(directory: Path) -> None:
    """Refuse what transformers would report late or unclearly; headers alone are read."""
    if not (directory / "config.json").is_file():
        hint = " it holds an adapter, not a base." if (directory / "adapter_config.json").is_file() else ""
        raise BaseNotFoundError(f"{directory} has no config.json, so it is no model directory.{hint}")
    read_headers(directory)


def _load_tokenizer(directory: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise BaseNotFoundError(f"{directory} holds no usable tokenizer: {_said(error)}") from error


def _load_model(directory: Path, dtype: torch.dtype | str) -> Any:
    try:
        try:
            model, report = _from_pretrained(directory, dtype, "sdpa")
        except ValueError as error:  # Gemma 2 soft-caps its attention scores, which sdpa cannot
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, report = _from_pretrained(directory, dtype, "eager")
    except Exception as error:  # transformers raises a dozen types for a bad directory
        raise BaseNotFoundError(f"transformers can't load {directory}: {_said(error)}") from error
    _check_report(directory, report)
    return model


def _from_pretrained(directory: Path, dtype: torch.dtype | str, attention: str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )


def _note_files(model: Any, directory: Path) -> None:
    """Tell `inject` where each weight can be read again, so that an exact unmerge needs no copy."""
    from lorasmith.lora import FileSource, set_file_source

    headers = read_headers(directory)
    names = [name for name, _ in model.named_parameters() if name in headers]
    set_file_source(model, FileSource({name: (headers[name].file, name) for name in names}))


def _check_report(directory: Path, report: dict[str, Any]) -> None:
    """Refuse a model with a weight that no file gave, which would be random, or a file weight left unused."""
    kinds = {
        "missing_keys": "in the model, not in the files",
        "unexpected_keys": "in the files, not in the model",
        "mismatched_keys": "of another shape in the files",
        "error_msgs": "reported as errors",
    }
    lines = []
    for kind, meaning in kinds.items():
        entries = sorted(str(entry) for entry in report.get(kind) or ())
        if entries:
            lines.append(f"  {len(entries)} {meaning}: {', '.join(entries[:8])}{' …' if entries[8:] else ''}")
    if lines:
        raise BaseNotFoundError("\n".join([f"the weights in {directory} don't fit its config.json:", *lines]))


def _said(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end an answer, without repeats, the generation config's first."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    return tuple(dict.fromkeys(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None))


def _choose_dtype(dtype: str | torch.dtype, device: str | torch.device) -> tuple[torch.dtype, str]:
    import torch

    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype} is not a floating dtype. Choices: {_dtype_choices()}.")
        return dtype, "as asked"
    if dtype == "auto":
        return _auto_dtype(torch.device(device).type)
    if dtype.removeprefix("torch.") not in DTYPES:
        hint = did_you_mean(dtype, ["auto", *DTYPES])
        raise ConfigError(f'dtype="{dtype}" is unknown. Choices: {_dtype_choices()}.{hint}')
    chosen: torch.dtype = getattr(torch, DTYPES[dtype.removeprefix("torch.")])
    return chosen, "as asked"


def _dtype_choices() -> str:
    return ", ".join(["auto", *DTYPES])


def _auto_dtype(device_type: str) -> tuple[torch.dtype, str]:
    import torch

    if device_type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies it in hardware"
        return torch.float32, "this GPU does not multiply bf16 in hardware"
    flags = [flag for flag in CPU_BF16_FLAGS if flag in _cpu_flags()] if device_type == "cpu" else []
    if flags:
        return torch.bfloat16, f"this CPU multiplies it in hardware ({', '.join(flags)})"
    return torch.float32, f"no bf16 multiplication in hardware is known for this {device_type}"


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Return the kernel's list of CPU features; empty where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    listed = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(listed, ":").partition(":")[2].split())
