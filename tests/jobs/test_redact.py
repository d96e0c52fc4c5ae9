"""Secrets go, everything else stays: pairs of texts from both sides of the border."""

import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.redact import redact

# Put together here, so that no scanner takes this file for a leak.
GITHUB = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
JWT = "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
PEM = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\nabc=\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("write to ann.b+c@example.co.uk, please", "write to [email], please"),
        ("<ann@example.org>", "<[email]>"),
        ("mailto:ann@example.org?subject=x", "mailto:[email]?subject=x"),
        ("ann@müller.de", "[email]"),
        ("call +49 171 1234567 now", "call [phone] now"),
        ("+1 (415) 555-2671", "[phone]"),
        ("+491752088077", "[phone]"),
        ("(415) 555-2671 or 415.555.2671", "[phone] or [phone]"),
        ("home: 0171 1234567.", "home: [phone]."),
        ("0171 1234567 0172 2345678 0173 3456789", "[phone] [phone] [phone]"),
        ("020 7946 0958", "[phone]"),
        ("01 23 45 67 89", "[phone]"),
        ("0049 171 1234567", "[phone]"),
        ("card 4111 1111 1111 1111 exp 12/29", "card [card] exp 12/29"),
        ("4111111111111111", "[card]"),
        ("amex 3782-822463-10005", "amex [card]"),
        ("5555555555554444,", "[card],"),
        ("IBAN DE89 3704 0044 0532 0130 00 please", "IBAN [iban] please"),
        ("gb82west12345698765432", "[iban]"),
        ("NL91ABNA0417164300.", "[iban]."),
        ("AKIA" + "IOSFODNN7EXAMPLE", "[key]"),
        (f"token is {GITHUB}!", "token is [key]!"),
        ("github_pat_" + "11ABCDEFG0abcdefghijkl_mnop", "[key]"),
        ("export OPENAI_API_KEY=sk-" + "proj-abc123DEF456ghi789JKL", "export OPENAI_API_KEY=[key]"),
        ("pk-" + "uQ3vZ8x1kq0tY2m5n7b9c4d6e8f0g2h4", "[key]"),
        ("xoxb-" + "123456789012-abcdefghijkl", "[key]"),
        ("AIza" + "SyA1234567890abcdefghijklmnopqrstuv", "[key]"),
        ("hf_" + "abcdefghijklmnopqrstuvwxyz123456", "[key]"),
        (f"Cookie: {JWT};", "Cookie: [token];"),
        ("Authorization: Bearer abcdef0123456789xyz", "Authorization: Bearer [token]"),
        (f"here:\n{PEM}\nthanks", "here:\n[private-key]\nthanks"),
        (PEM[:60], "[private-key]"),
        ("postgres://app:s3cret@db/main", "postgres://app:[password]@db/main"),
        ("password: hunter2!", "password: [password]"),
        ("my passwd is Tr0ub4dor", "my passwd is [password]"),
        ("api_key=abc123def", "api_key=[password]"),
        ("md5 d41d8cd98f00b204e9800998ecf8427e ok", "md5 [secret] ok"),
        ("wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYzEXAMPLEKEY1a2B3c", "[secret]"),
    ],
)
def test_secrets_become_their_kind(text: str, left: str) -> None:
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "version 10.0.19041.1288 of 2.6.31-15-generic",
        "192.168.1.254 and 10.0.0.1:8080 and fe80::0202:b3ff:fe1e:8329",
        "2004-05-12 10:00:00+00:00, 12.05.2004, 05/12/2004, 20040512T101500",
        "at 1700000000 and 1700000000123 seconds since 1970",
        "commit 58b2939b4d5a and 7fcab2b",
        "UUID=b9212eb1-5f4c-4dd6-add9-d85b791ee9fb",
        "/usr/share/doc/python3-SomeThing/examples/Readme2.txt",
        "http://example.com/ProjectContent/StatusHotKeys/StatusHotKeys_v1.5.2_Source.zip",
        "git clone git@github.com:owner/name.git",
        "npm install left-pad@1.3.0 @types/node@20",
        "@app.route('/x') def f(self, *, password=None): return getpass(password)",
        "password = input('password: ')  # ask for the password",
        "the bearer of this letter, bearer authentication",
        "sk-learn and pk-fields and sk_test",
        "1234567812345678 has a wrong prefix, 4111111111111112 a wrong sum",
        "DE89 3704 0044 0532 0130 01 has a wrong sum",
        "AB12 CDEF is a plate",
        "isbn 978-3-16-148410-0",
        "chmod 0644 and 0755, mask 0022",
        "0x7fff5fbff8c0 at line 12345",
        "ThisIsAVeryLongClassNameForAnAbstractFactory2Bean",
        "this-is-a-very-long-kebab-case-name-2-with-words",
        "3.14159265358979323846",
        "00000010: 01 02 03 04 05 06 07 08, 01 02 03",
        "#ubuntu-offtopic is 5 lines * 1000 words",
        "ssh root@192.168.0.1 or user@localhost",
        "grüße an alle, 今日は, привет",
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@given(st.binary(min_size=32, max_size=64))
def test_random_keys_in_hex_go(key: bytes) -> None:
    assert redact(f"key {key.hex()} end") == "key [secret] end"


def test_most_random_keys_in_base64_go() -> None:
    keys = [
        base64.b64encode(bytes((i * 37 + j * j * 101 + j * i) % 256 for j in range(32))).decode() for i in range(100)
    ]
    assert sum(redact(key) == "[secret]" for key in keys) >= 85


SHARDS = ["a@b.de", "+49 171 123456", GITHUB, "4111111111111111", "password: x9y8z7", "[email]", "://u:p1@h", " ", "\n"]
ANY = st.lists(st.one_of(st.sampled_from(SHARDS), st.text(string.printable, max_size=12)), max_size=8).map("".join)


@given(ANY)
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


@pytest.mark.parametrize(
    "unit", ["a", "1", "a.", "1 ", "a@", "-", "+1 ", "Aa1/", "eyJ", "://", "password:", "DE89 ", "020 7946 0958 "]
)
def test_long_hostile_text_is_read_in_reasonable_time(unit: str) -> None:
    redact(unit * (50_000 // len(unit)))  # quadratic patterns would take minutes
