"""A byte tokenizer with a ChatML template like SmolLM2's, for tests that need no download.

Ids 0…255 are bytes, then come the special tokens. With `merges`, a pair of characters becomes one token,
which is how a test sees whether segments were tokenised apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
EOS, IM_START, IM_END, BOS = range(256, 260)
DEFAULT_SYSTEM = "You are a helpful assistant."


class ByteTokenizer:
    """Duck-typed like a Hugging Face tokenizer, as far as `lorasmith.data` goes."""

    def __init__(self, *, chat: bool = True, adds_bos: bool = False, merges: Sequence[str] = ()) -> None:
        self.chat_template = "chatml" if chat else None
        self.adds_bos = adds_bos
        self.bos_token_id: int | None = BOS if adds_bos else IM_START
        self.eos_token_id: int | None = IM_END if chat else EOS
        self.all_special_ids = [EOS, IM_START, IM_END, BOS]
        self.pieces = {
            **{s: EOS + i for i, s in enumerate(SPECIALS)},
            **{m: 260 + i for i, m in enumerate(merges)},
        }
        self.pattern = re.compile("(" + "|".join(map(re.escape, self.pieces)) + ")")

    def __len__(self) -> int:
        return 256 + len(self.pieces)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [BOS] if self.adds_bos and add_special_tokens else []
        for part in self.pattern.split(text):
            ids += [self.pieces[part]] if part in self.pieces else list(part.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        texts = {number: piece for piece, number in self.pieces.items()}
        raw = b"".join(texts[i].encode() if i in texts else bytes([i]) for i in map(int, ids))
        return raw.decode(errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, str]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        assert not tokenize
        if messages[0]["role"] != "system":  # IndexError for an empty list, as Jinja raises its own
            messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
        text = "".join(
            f"<|im_start|>{m['role']}\n{self.content(messages, i)}" for i, m in enumerate(messages)
        )
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def content(self, messages: Sequence[dict[str, str]], index: int) -> str:
        """What stands between the role and the next turn; tests override it."""
        return f"{messages[index]['content']}<|im_end|>\n"
