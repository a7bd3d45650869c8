"""How servers are given adapters, and how a request names one: one class for each kind of server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lorasmith.errors import ConfigError, did_you_mean
from lorasmith.verify.client import Client, Reply
from lorasmith.verify.probes import LONG_TOKENS

FILES = ("adapter_config.json", "adapter_model.safetensors", "lorasmith.json")
# What no adapter may be called: read as a path, some would leave the folder that adapters lie in.
BAD_NAMES = ("../verify-escape", "/tmp/verify-escape", "..", "a/../../b", "verify\x00null", "", "v" * 5000)
_LOADING = ("its API cannot load adapters", "start the server with adapters of `lorasmith verify --prepare`")


class Api:
    """A server that was started with its adapters, and names them as `model`."""

    kind = "openai"
    can_load = False
    why_not = _LOADING[0]
    prompt_tokens = LONG_TOKENS

    def __init__(self, client: Client, names: Mapping[str, str]) -> None:
        self._client = client
        self._names = dict(names)  # ours → the server's

    def fields(self, name: str) -> dict[str, Any]:
        """What a request adds to ask for this adapter."""
        return {"model": self._names.get(name, name)}

    @property
    def names(self) -> list[str]:
        """Adapters that can be asked for."""
        return list(self._names)

    async def load(self, name: str, directory: Path) -> Reply:
        """Serve a directory under a name; under a name that is there, instead of what it was."""
        raise NotImplementedError

    async def unload(self, name: str) -> Reply:
        """Serve it no longer."""
        raise NotImplementedError

    async def try_bad_names(self, good: Path) -> list[tuple[str, Reply]]:
        """Load under names that no adapter may have."""
        return [(f"the name {_short(name)}", await self.load(name, good)) for name in BAD_NAMES]

    async def tidy(self) -> None:
        """Take away what was loaded."""
        for name in self.names:
            await self.unload(name)


class LorasmithApi(Api):
    """Uploads through our admin API."""

    kind, can_load = "lorasmith", True

    async def load(self, name: str, directory: Path) -> Reply:
        """Upload, make it the next version, load it."""
        begun = await self._admin("/admin/uploads")
        if not begun.is_ok:
            return begun
        upload = begun.body["upload"]
        for file in sorted(p for p in directory.iterdir() if p.name in FILES):
            sent = await self._put(upload, file.name, file.read_bytes())
            if not sent.is_ok:
                await self._client.send("DELETE", f"/admin/uploads/{upload}", as_admin=True)
                return sent
        added = await self._admin("/admin/adapters", name=name, upload=upload)
        if not added.is_ok:
            return added
        self._names[name] = name
        return await self._admin("/admin/load", model=name)

    async def unload(self, name: str) -> Reply:
        """Withdraw it."""
        self._names.pop(name, None)
        return await self._admin("/admin/unload", model=name)

    async def try_bad_names(self, good: Path) -> list[tuple[str, Reply]]:
        """Also as the names of files."""
        tried = await super().try_bad_names(good)
        upload = (await self._admin("/admin/uploads")).body["upload"]
        for file in ("../adapter_config.json", "/tmp/verify-escape", "..", "pickle.bin"):
            tried.append((f"an upload's file {file}", await self._put(upload, file, b"{}")))
        await self._client.send("DELETE", f"/admin/uploads/{upload}", as_admin=True)
        return tried

    async def tidy(self) -> None:
        """Remove every version."""
        for name in self.names:
            await self._admin("/admin/remove", model=name, drop_aliases=True)

    async def _admin(self, path: str, **body: Any) -> Reply:
        return await self._client.send("POST", path, as_admin=True, json=body)

    async def _put(self, upload: str, file: str, content: bytes) -> Reply:
        path = f"/admin/uploads/{upload}/{quote(file, safe='')}"
        return await self._client.send("PUT", path, as_admin=True, content=content)


class VllmApi(Api):
    """vLLM's runtime updates (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True). It reads paths of its own machine."""

    kind, can_load = "vllm", True

    async def load(self, name: str, directory: Path) -> Reply:
        """A name that is there is replaced in place."""
        body = {"lora_name": name, "lora_path": str(directory.resolve()), "load_inplace": name in self._names}
        reply = await self._client.send("POST", "/v1/load_lora_adapter", json=body)
        if reply.is_ok:
            self._names[name] = name
        return reply

    async def unload(self, name: str) -> Reply:
        """By name."""
        self._names.pop(name, None)
        return await self._client.send("POST", "/v1/unload_lora_adapter", json={"lora_name": name})

    async def try_bad_names(self, good: Path) -> list[tuple[str, Reply]]:
        """Also paths that hold no adapter."""
        tried = await super().try_bad_names(good)
        for path in ("/etc", "../../../../etc", "/dev/zero"):
            tried.append((f"the path {path}", await self.load("verify-path", Path(path))))
        return tried


class LlamaApi(Api):
    """llama.cpp's server: adapters come with --lora, and a request gives each a scale by number."""

    kind = "llama-server"
    prompt_tokens = 96  # it reuses caches token by token; see strong.py for why no more

    def __init__(self, client: Client, names: Mapping[str, str], ids: Mapping[str, int]) -> None:
        super().__init__(client, names)
        self._ids = dict(ids)

    def fields(self, name: str) -> dict[str, Any]:
        """A request that names no adapter gets the server's default."""
        wanted = {"lora": [{"id": self._ids[name], "scale": 1.0}]} if name in self._ids else {}
        return {"model": name, **wanted}


KINDS = ("auto", "lorasmith", "vllm", "llama-server", "openai")


async def find_api(client: Client, kind: str, prepared: Mapping[str, tuple[str, Path]]) -> Api:
    """Which API this server has.

    Args:
        kind: one of `KINDS`.
        prepared: our name → the server's name and the local directory, of adapters that it was started with.

    Raises:
        ConfigError: `kind` is unknown, or llama-server lists other adapters than `prepared` names.
    """
    if kind not in KINDS:
        raise ConfigError(f'--api "{kind}": use one of {", ".join(KINDS)}.{did_you_mean(kind, KINDS)}')
    names = {ours: theirs for ours, (theirs, _) in prepared.items()}
    if kind in ("auto", "llama-server"):
        listed = await client.send("GET", "/lora-adapters")
        if listed.is_ok and isinstance(listed.body, list):
            return LlamaApi(client, names, _llama_ids(listed.body, prepared))
    if prepared:
        return Api(client, names)
    if kind == "lorasmith" or (kind == "auto" and await _answers(client, "GET", "/admin/status")):
        return LorasmithApi(client, names)
    if kind == "vllm" or (kind == "auto" and await _answers(client, "POST", "/v1/load_lora_adapter")):
        return VllmApi(client, names)
    api = Api(client, names)
    api.why_not = ": ".join(_LOADING)
    return api


async def _answers(client: Client, method: str, path: str) -> bool:
    """Whether the route is there and open to us. vLLM refuses an empty request, so nothing is loaded."""
    is_admin = path.startswith("/admin")
    reply = await client.send(method, path, as_admin=is_admin, json=None if method == "GET" else {})
    return reply.is_ok if is_admin else reply.status in (200, 400, 422)


def _llama_ids(listed: list[Any], prepared: Mapping[str, tuple[str, Path]]) -> dict[str, int]:
    ids = {}
    for ours, (_, directory) in prepared.items():
        found = [e["id"] for e in listed if directory.name in Path(str(e.get("path", ""))).parts]
        if len(found) != 1:
            raise ConfigError(
                f"llama-server lists {len(found)} adapters below a folder {directory.name}; start it with "
                f"--lora {directory.parent / 'gguf' / directory.name / 'adapter.gguf'} and the like, as `lorasmith verify --prepare` says."
            )
        ids[ours] = int(found[0])
    return ids


def _short(name: str) -> str:
    return repr(name) if len(name) < 40 else f"of {len(name)} letters"
