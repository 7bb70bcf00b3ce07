"""Keeps secrets out of what a run writes."""

import os
import re
from typing import Any

PLACEHOLDER = "[redacted]"
# Not 40 hexadecimal digits: older keys of wandb are, and commits too; `redact` knows the former
# from the environment.
SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bwandb_v1_\w{16,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{35}|\bya29\.[\w-]{16,}"
    # JSON web tokens; keys as PEM has them.
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]*-----END [A-Z ]*PRIVATE KEY-----)?"
    # Slack, Stripe, npm, PyPI, Groq, NVIDIA, Replicate, xAI, Databricks, Docker, Vault, SendGrid,
    # DigitalOcean, Atlassian, Shopify, Linear, age.
    r"|\bxox[abeoprs]-[\w-]{10,}|\b[rs]k_(?:live|test)_\w{16,}|\bnpm_\w{30,}|\bpypi-[\w-]{50,}"
    r"|\bgsk_\w{20,}|\bnvapi-[\w-]{20,}|\br8_\w{30,}|\bxai-\w{20,}|\bdapi[0-9a-f]{32}\b"
    r"|\bdckr_pat_[\w-]{16,}|\bhvs\.[\w-]{16,}|\bSG\.[\w-]{16,}\.[\w-]{16,}"
    r"|\bdop_v1_\w{32,}|\bATATT3[\w=-]{16,}|\bshp(?:at|ca|pa|ss)_\w{16,}|\blin_api_\w{16,}"
    r"|\bAGE-SECRET-KEY-1\w{16,}"
    # user:password@ and token@ of a URL, up to the last @: a password may hold one.
    r"|(?<=://)[^/\s:@]*:[^/\s]+(?=@)|(?<=https://)[^/\s:@]{8,}(?=@)"
    r"|(?i:(?<=[?&]token=)|(?<=[?&]access_token=)|(?<=[?&]api_key=)|(?<=[?&]sig=)"
    r"|(?<=[?&]X-Amz-Signature=)|(?<=[?&]X-Amz-Security-Token=))[^&\s\"']{8,}"
    r"|(?i:(?<=\bbearer ))[\w.~+/=-]{8,}"
)
# Anywhere in a name: GITHUBTOKEN and MYPASSWORD have no word boundaries. A tokenizer, a number of
# tokens, a figure per token and a special token such as eos_token are none.
SECRET_NAME = re.compile(
    r"(?<!(?:per|bos|eos|pad|unk|sep|cls)_)token(?!iz|s(?:_|$))"
    r"|secret|passw(?:or)?d|passphrase|credential|(?<!old)(?<=[a-z0-9_])pwd(?:$|_)"
    r"|(?:^|_)(?:pat|jwt|dsn|bearer|cookie)(?:$|_)"
    r"|(?:api|access|private|signing|encryption|storage|account|deploy|ssh|master)_?key",
    re.IGNORECASE,
)
SHORTEST_SECRET = 6
SHORTEST_RANDOM = 16
"""Characters from which on nobody writes the same by chance."""


def is_secret_name(name: str) -> bool:
    """True for the name of a key or variable such as `hub_token`, `WANDB_API_KEY`, `MYPASSWORD`.

    False for the name of a file that holds a secret: the path is none.
    """
    is_path = name.lower().endswith(("_path", "_file", "_dir"))
    return SECRET_NAME.search(name) is not None and not is_path


def redact(text: str) -> str:
    """`text` without anything that looks like a secret, or is one in the environment."""
    secrets = {value for name, value in os.environ.items() if is_secret_name(name)}
    # The longest first: one may begin another.
    for value in sorted(secrets, key=len, reverse=True):
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, PLACEHOLDER)
    return SECRET_VALUE.sub(PLACEHOLDER, text)


def holds_secret(text: str) -> bool:
    """Whether a text holds what looks like a secret, or a long one of the environment.

    A short password may be a word that stands in paths too.
    """
    secrets = (value for name, value in os.environ.items() if is_secret_name(name))
    is_known = any(len(value) >= SHORTEST_RANDOM and value in text for value in secrets)
    return is_known or SECRET_VALUE.search(text) is not None


def redact_values(value: Any) -> Any:
    """`redact` for every text inside mappings and lists."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact_values(item) for item in value]
    return value
