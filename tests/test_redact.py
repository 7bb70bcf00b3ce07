import os
from pathlib import Path

import pytest

from sft_fast.redact import holds_secret, is_secret_name, redact, redact_values

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwx",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-proj-abcdefghijklmnop",
    "MY_PASSWORD": "correct horse battery",
}
SECRET_NAMES = """
    AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY access_key apikey API_KEY wandb_api_key private_key
    HF_TOKEN hub_token token GITHUBTOKEN NPM_AUTHTOKEN token_1
    MYPASSWORD password db_passwd dbpasswd PGPASSWORD SSH_PASSPHRASE
    SECRET client_secret MySecretValue credential credentials AZURE_CREDENTIALS
    GITHUB_PAT MYSQL_PWD SENTRY_DSN AUTH_JWT SESSION_COOKIE STORAGE_ACCOUNT_KEY ENCRYPTION_KEY
"""
OTHER_NAMES = """
    tokenizer TOKENIZERS_PARALLELISM tokenizer_model tokens max_new_tokens add_tokens num_tokens_max
    experts_per_token num_experts_per_token calculate_per_token_loss bits_per_token
    eos_token bos_token pad_token unk_token path keyboard accessible api key pass compass PWD OLDPWD
    PATH pattern compat_mode dispatch keys_last sort_key dsnap
    HF_TOKEN_PATH GOOGLE_APPLICATION_CREDENTIALS_FILE SECRETS_DIR token_file
"""


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if is_secret_name(name)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_a_name_says_that_it_holds_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_secret_name(name) and is_secret_name(name.swapcase())
    monkeypatch.setenv(name, "value-of-it")
    assert redact("a value-of-it b") == "a [redacted] b"


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_a_name_that_only_sounds_like_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_secret_name(name)
    monkeypatch.setenv(name, "value-of-it")
    assert redact("a value-of-it b") == "a value-of-it b"


def test_no_key_of_ours_is_a_secret() -> None:
    from sft_fast.config.schema import Config
    from sft_fast.config.validation import dotted_keys

    keys = list(dotted_keys(Config))
    assert "evaluation.max_new_tokens" in keys
    assert not [key for key in keys if is_secret_name(key.rpartition(".")[2])]


def test_a_secret_that_begins_another_leaves_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdef")
    monkeypatch.setenv("B_TOKEN", "abcdefgh")
    assert redact("abcdefgh abcdef") == "[redacted] [redacted]"


def test_secrets_of_the_environment_are_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = redact(f"a {' '.join(SECRETS.values())} b")
    assert text == f"a {' '.join(['[redacted]'] * len(SECRETS))} b"
    untouched = (
        "revision 0123456789abcdef0123456789abcdef01234568 tokens_per_s sk-1 hf_home "
        "hf_internal_testing/tiny-random-model ssh://git@host/x https://host/a@b:c s3://b/k@1 "
        "https://host/x?tokens=12345678&token_count=12345678 a bearer of news"
    )
    assert redact(untouched) == untouched
    assert redact_values({"a": [SECRETS["HF_TOKEN"], 1]}) == {"a": ["[redacted]", 1]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw123@host/x", "https://[redacted]@host/x"),
        ("https://me:p@ss:w0rd@host/x", "https://[redacted]@host/x"),
        ("redis://:pw123@host:1/x", "redis://[redacted]@host:1/x"),
        ("https://0123456789abcdef@host/x", "https://[redacted]@host/x"),
        ("GET /x?a=1&token=0123456789&b=2 x", "GET /x?a=1&token=[redacted]&b=2 x"),
        ("s3?X-Amz-Signature=0123456789abcdef", "s3?X-Amz-Signature=[redacted]"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer [redacted]"),
        ("hf_abcdefghijklmnopqrstuvwxyzabcdefgh", "[redacted]"),
        ("github_pat_11ABCDEFG0abcdefghij_x", "[redacted]"),
        ("wandb_v1_abcdefghijklmnop", "[redacted]"),
        ("AKIAABCDEFGHIJKLMNOP", "[redacted]"),
    ],
)
def test_secrets_are_known_by_their_looks(text: str, expected: str) -> None:
    assert redact(f"x {text}.") in (f"x {expected}.", f"x {expected}")


FORMS = (
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "xoxb-123456789012-abcdefghij",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "sk_live_abcdefghijklmnop1234",
    f"npm_{'a1' * 18}",
    f"dapi{'0a' * 16}",
    f"gsk_{'a1' * 12}",
    f"pypi-{'Ag' * 30}",
    f"nvapi-{'a-' * 12}",
    "hvs.CAESIabcdefghijklmnop",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----",
)


@pytest.mark.parametrize("secret", FORMS)
def test_tokens_are_known_by_their_form(secret: str) -> None:
    assert redact(f"a {secret} b") == "a [redacted] b"
    assert holds_secret(f"x {secret}")


def test_the_saved_configuration_is_what_was_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_fast.config.schema import load_config, save_config
    from sft_fast.errors import ConfigError

    monkeypatch.setenv("PGPASSWORD", "llamas")
    config = load_config(None, ["output_dir=outputs/llamas"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", []) == config
    # Nobody writes such a value by chance.
    monkeypatch.setenv("MYSQL_PWD", "correct-horse-battery")
    with pytest.raises(ConfigError, match="output_dir") as caught:
        load_config(None, ["output_dir=correct-horse-battery"])
    assert "a password (not shown)" in str(caught.value)
    assert "correct-horse" not in str(caught.value)
