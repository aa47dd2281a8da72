"""How the brokers are spoken to: what fits together in `[journal]`, and that no password is ever in it."""

from __future__ import annotations

import json
import tomllib

import pytest

from appliance.settings import child_settings
from cdp import config
from cdp.errors import ConfigError
from cdp.journal.kafka.security import PASSWORD_VARIABLE, Security

GROUP = '\n[[group]]\nname = "shop"\n[[group.volume]]\nname = "db"\nprimary = "file:db.raw"\nsize = "1GiB"\n'
KAFKA = 'kind = "kafka"\nbootstrap_servers = ["k:9092"]\n'
SASL = 'security_protocol = "SASL_SSL"\nsasl_user = "cdp"\n'


def parsed(journal: str) -> config.Config:
    return config.parse(tomllib.loads(f"[journal]\n{journal}{GROUP}"), "/srv/here")


@pytest.mark.parametrize(
    ("journal", "words"),
    [
        ('ssl_ca = "ca.pem"\n', ["ssl_ca", 'kind = "kafka"', "embedded"]),
        (KAFKA + 'ssl_ca = "ca.pem"\n', ["ssl_ca needs", '"SASL_SSL"', '"PLAINTEXT"']),
        (KAFKA + 'security_protocol = "SASL_PLAINTEXT"\nsasl_user = "u"\nssl_ca = "c"\nssl_check_hostname = false\n',
         ["ssl_ca, ssl_check_hostname need"]),
        (KAFKA + 'security_protocol = "SSL"\nsasl_user = "cdp"\n', ["sasl_user needs", '"SASL_PLAINTEXT"', '"SSL"']),
        (KAFKA + 'security_protocol = "SASL_SSL"\n', ["sasl_user is missing"]),
        (KAFKA + 'security_protocol = "SSL"\nssl_key = "k.pem"\n', ["ssl_key", "ssl_certificate"]),
        (KAFKA + 'security_protocol = "TLS"\n', ["security_protocol", "SASL_SSL"]),
        (KAFKA + SASL + 'sasl_mechanism = "GSSAPI"\n', ["sasl_mechanism", "SCRAM-SHA-512"]),
        (KAFKA + 'security_protocol = "SASL_SSL"\nsasl_user = "a,b"\n', ["sasl_user"]),
        (KAFKA + SASL + 'sasl_password = "Sesame"\n', ["unknown key journal.sasl_password", "sasl_password_file"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(journal: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(journal)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "Sesame" not in str(caught.value)


def test_what_fits_reaches_the_child_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "Sesame")
    c = parsed(KAFKA + SASL + 'ssl_ca = "ca.pem"\nsasl_password_file = "secret/password"\n')
    settings = child_settings("relay", c)
    security = Security(**settings["kafka"]["security"])
    assert security.ssl_ca == "/srv/here/ca.pem" and security.sasl_password_file == "/srv/here/secret/password"
    assert security.sasl_mechanism == "SCRAM-SHA-512" and security.encrypted and security.authenticated
    assert "Sesame" not in json.dumps(settings) + repr(security)


def test_defaults_are_a_network_of_ones_own() -> None:
    security = Security(**child_settings("relay", parsed(KAFKA))["kafka"]["security"])
    assert security == Security() and security.settings() == {"security_protocol": "PLAINTEXT"}
    written_out = 'security_protocol = "PLAINTEXT"\nssl_check_hostname = true\nsasl_user = ""\n'
    assert parsed(KAFKA + written_out).journal.security_protocol == "PLAINTEXT"
