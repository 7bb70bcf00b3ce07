"""A conversation with an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft_fast.data.template_limits import TemplateLimits, check_length
from sft_fast.errors import DamageError, first_line
from sft_fast.runtime.terminal import printable


class Chat:
    """Keeps the turns; every answer sees all of them."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str | None = None,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
    ) -> None:
        """
        Args:
            folder: what transformers loads; its code is not run.
            device: None: a GPU where there is one.
            system: text of the system turn.
            max_new_tokens: longest answer, tokens.
            temperature: 0: the likeliest token each time.

        Raises:
            ValueError: an argument that makes no sense, a device that is not there, or a model
                without tokenizer or chat template.
            DamageError: files are missing, or cut short.
        """
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        if max_new_tokens < 1 or not temperature >= 0:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens} and temperature {temperature}; expected at "
                "least 1 and at least 0"
            )
        check_files(folder)
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(self._device)
        self._tokenizer: Any = load_tokenizer(folder)
        if not self._tokenizer.chat_template:
            raise ValueError(f"{folder} has no chat template; it is not a model to talk to")
        self._model: Any = load_model(folder).to(self._device).eval()
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if temperature > 0:
            self._options |= {"do_sample": True, "temperature": temperature}
        self._system = [{"role": "system", "content": system}] if system else []
        self.forget()

    def forget(self) -> None:
        """Begins a new conversation."""
        self._turns = list(self._system)

    def answer(self, question: str, is_streamed: bool = False) -> str:
        """Asks, and remembers question and answer.

        Args:
            question: the user's turn.
            is_streamed: print the answer while it comes.
        """
        import torch
        from transformers import TextStreamer

        self._turns.append({"role": "user", "content": question})
        with TemplateLimits():
            text = self._tokenizer.apply_chat_template(
                self._turns, tokenize=False, add_generation_prompt=True
            )
        check_length(text, self._turns)
        inputs = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        inputs = {key: inputs[key].to(self._device) for key in ("input_ids", "attention_mask")}
        streamer = None
        if is_streamed:
            streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
            show = streamer.on_finalized_text
            streamer.on_finalized_text = lambda text, stream_end=False: show(
                printable(text), stream_end
            )
        with torch.no_grad():
            output = self._model.generate(**inputs, streamer=streamer, **self._options)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        answer: str = self._tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
        self._turns.append({"role": "assistant", "content": answer})
        return answer


def check_files(folder: Path) -> None:
    """Raises DamageError when files have not the sizes that the manifest of an export says."""
    from sft_fast.runtime.manifest import MANIFEST_FILE, find_damage

    if (folder / MANIFEST_FILE).exists():
        damages = find_damage(folder, is_hashed=lambda name: False)
        if damages:
            raise DamageError("\n  ".join([f"{folder} is damaged:", *map(str, damages)]))


def check_device(name: str) -> None:
    """Raises ValueError where a tensor cannot be put on the device and read from it."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise ValueError(
            f"device: {name} cannot be used here ({reason}); expected cpu, or cuda with a GPU"
        ) from None


def load_tokenizer(folder: Path) -> Any:
    """Raises ValueError where a file of it is missing or damaged."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {error}") from None


def load_model(folder: Path) -> Any:
    """The model of a directory.

    Raises:
        DamageError: a file of weights cannot be read.
        ValueError: it answers with numbers, and transformers would give it random words.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    classes = AutoConfig.from_pretrained(folder).architectures or []
    if any(name.endswith("ForSequenceClassification") for name in classes):
        raise ValueError(
            f"{folder} is a {classes[0]}, which scores texts; its README.md shows how to ask it"
        )
    try:
        return AutoModelForCausalLM.from_pretrained(folder)
    except SafetensorError as error:
        raise DamageError(
            f"{folder}: a *.safetensors file is damaged ({error}); copy or export it again"
        ) from None
