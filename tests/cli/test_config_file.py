"""What can be written in crail.toml, CRAIL_* and --set, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from crailfs import config_file
from crailfs.config_file import REGION_KEYS, SECTIONS, Settings
from crailfs.errors import ConfigurationError
from crailfs.records import Tier
from crailfs.units import GIB, MIB

GOOD = """
[cluster]
id = "00112233445566778899aabbccddeeff"
secret_file = "secret"
metadata = "meta1:9060"

[metadata]
state = "/srv/crail/metadata"
listen = ["0.0.0.0:9060", "unix:/run/crail/metadata.sock"]

[storage]
state = "state"
listen = ["10.0.0.7:9061"]
rack = "r7"

[[storage.region]]
tier = "memory"
path = "/dev/shm/crail.region"
size = "4GiB"

[[storage.region]]
tier = "disk"
path = "disk.region"
size = 1073741824

[client]
transports = ["tcp"]

[mount]
mountpoint = "/crail"
"""


def write(directory: Path, text: str, secret: str = "0123456789abcdef\n") -> Path:
    secret_file = directory / "secret"
    secret_file.write_text(secret)
    secret_file.chmod(0o600)
    file = directory / "crail.toml"
    file.write_text(text)
    return file


def settings(directory: Path, text: str = GOOD, **environment: str) -> Settings:
    return Settings.load(write(directory, text), (), environment)


def test_a_good_file_becomes_every_struct(tmp_path: Path) -> None:
    loaded = settings(tmp_path)
    metadata, storage, mount = loaded.metadata(), loaded.storage(), loaded.mount()
    assert metadata.state == Path("/srv/crail/metadata")
    assert metadata.listen == ("0.0.0.0:9060", "unix:/run/crail/metadata.sock")
    assert metadata.credentials.cluster_id == bytes.fromhex("00112233445566778899aabbccddeeff")
    assert metadata.credentials.secret == b"0123456789abcdef"
    assert storage.metadata == "meta1:9060"
    assert storage.rack == "r7"
    assert [(region.tier, region.size_bytes) for region in storage.regions] == [
        (Tier.MEMORY, 4 * GIB),
        (Tier.DISK, GIB),
    ]
    assert mount.client.transports == ("tcp",)
    assert mount.mountpoint == Path("/crail")


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    storage = settings(tmp_path).storage()
    assert storage.state == tmp_path / "state"
    assert storage.regions[1].path == tmp_path / "disk.region"


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    rack = {"CRAIL_STORAGE_RACK": "from-environment"}
    assert Settings.load(file, (), {}).storage().rack == "r7"
    assert Settings.load(file, (), rack).storage().rack == "from-environment"
    over = ["storage.rack=from-option"]
    assert Settings.load(file, over, rack).storage().rack == "from-option"
    assert Settings.load(file, (), {}).storage().advertise == ""


def test_lists_and_numbers_from_the_environment(tmp_path: Path) -> None:
    loaded = settings(
        tmp_path,
        CRAIL_METADATA_LISTEN="unix:/a.sock, [::1]:7",
        CRAIL_METADATA_BLOCK_SIZE="128KiB",
        CRAIL_CLIENT_OPERATION_TIMEOUT_MS="2500",
        CRAIL_MOUNT_ALLOW_OTHER="false",
    )
    assert loaded.metadata().listen == ("unix:/a.sock", "[::1]:7")
    assert loaded.metadata().block_size_bytes == 128 << 10
    assert loaded.client().operation_timeout_ms == 2500
    assert loaded.mount().allow_other is False


@pytest.mark.parametrize(
    ("written", "bytes_meant"),
    [
        ("4GiB", 4 * GIB),
        ("4G", 4 * GIB),
        ("512 MiB", 512 * MIB),
        ("1.5GiB", GIB * 3 // 2),
        ("4096", 4096),
        ("7B", 7),
        ("1kib", 1024),
    ],
)
def test_sizes(tmp_path: Path, written: str, bytes_meant: int) -> None:
    loaded = settings(tmp_path, GOOD.replace('"4GiB"', f'"{written}"'))
    assert loaded.storage().regions[0].size_bytes == bytes_meant


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[cluster]", "[clutser]", "crail.toml: clutser: unknown key; did you mean 'cluster'?"),
        ("rack =", "rak =", "crail.toml: storage.rak: unknown key; did you mean 'rack'?"),
        ("tier =", "teir =", "storage.region[0].teir: unknown key; did you mean 'tier'?"),
        ('"memory"', '"ram"', "storage.region[0].tier: expected one of 'pmem', 'memory', 'nvme'"),
        ('"4GiB"', '"4 giraffes"', "storage.region[0].size: expected a size such as '4GiB'"),
        ('"4GiB"', "-1", "storage.region[0].size: expected a size"),
        ('"4GiB"', "true", "storage.region[0].size: expected a size"),
        ('"meta1:9060"', '"meta1"', "cluster.metadata: expected 'unix:/path' or 'host:port'"),
        ('"meta1:9060"', '"meta1:99999"', "cluster.metadata: expected 'unix:/path' or 'host:port'"),
        ('"meta1:9060"', '":9060"', "cluster.metadata: expected 'unix:/path' or 'host:port'"),
        ('"meta1:9060"', "9060", "cluster.metadata: expected 'unix:/path' or 'host:port'"),
        ('["10.0.0.7:9061"]', "[]", "storage.listen: expected at least one address"),
        ('["10.0.0.7:9061"]', '["a:1", "b:2"]', "storage.listen: expected at most one"),
        ('["tcp"]', '["rdam"]', "client.transports: expected a list of different transports"),
        ('["tcp"]', '["tcp", "tcp"]', "client.transports: expected a list of different"),
        ("00112233445566778899aabbccddeeff", "0011", "cluster.id: expected 32 hexadecimal digits"),
        ("disk.region", "/dev/shm/crail.region", "storage.region[1].path: expected a file of its"),
        ('tier = "disk"\n', "", "storage.region[1]: tier is not set"),
        ('state = "state"', "", "crail.toml: storage.state is not set: set it there, by CRAIL_STO"),
        ("[mount]", "[mount", "crail.toml: not a TOML file: "),
        ("[mount]\nmountpoint", "mount", "crail.toml: client.mount: unknown key"),
    ],
)
def test_a_mistake_names_file_key_and_what_was_expected(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    with pytest.raises(ConfigurationError) as raised:
        loaded = settings(tmp_path, GOOD.replace(old, new, 1))
        loaded.metadata(), loaded.storage(), loaded.mount()
    assert str(tmp_path / "crail.toml") in raised.value.message
    assert message in raised.value.message


def test_block_size_must_be_a_power_of_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"CRAIL_METADATA_BLOCK_SIZE: expected a power"):
        settings(tmp_path, CRAIL_METADATA_BLOCK_SIZE="96KiB").metadata()


@pytest.mark.parametrize("name", ["CRAIL_STORAGE_RAK", "CRAIL_METDATA_LISTEN"])
def test_a_misspelt_variable_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"environment: {name}: unknown key; did you me"):
        settings(tmp_path, **{name: "x"})


def test_a_misspelt_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--set storage\.rak: .*'storage\.rack'"):
        Settings.load(None, ["storage.rak=x"], {})
    with pytest.raises(ConfigurationError, match=r"expected section\.key=value"):
        Settings.load(None, ["storage.rack"], {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"/none\.toml: cannot read .*No such file"):
        Settings.load(tmp_path / "none.toml", (), {})


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    loaded = settings(tmp_path)
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"secret has mode 0{mode:o}.*chmod 600"):
        loaded.client()


@pytest.mark.parametrize("secret", ["short\n", "x" * 1025, ""])
def test_a_secret_of_a_wrong_length_is_refused(tmp_path: Path, secret: str) -> None:
    file = write(tmp_path, GOOD, secret)
    with pytest.raises(ConfigurationError, match=r"expected a secret of 16 to 1024 bytes"):
        Settings.load(file, (), {}).client()


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    loaded = settings(tmp_path)
    (tmp_path / "secret").unlink()
    with pytest.raises(ConfigurationError, match=r"cluster\.secret_file: cannot read the secret"):
        loaded.client()


def test_every_key_is_documented() -> None:
    manual = (Path(config_file.__file__).parents[1] / "docs" / "operations.md").read_text()
    keys = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]
    keys += [f"storage.region.{key}" for key in REGION_KEYS]
    assert [key for key in keys if f"| `{key}` |" not in manual] == []


def test_the_example_is_a_good_configuration(tmp_path: Path) -> None:
    example = Path(config_file.__file__).parents[1] / "packaging" / "crail.toml"
    loaded = settings(tmp_path, example.read_text().replace("/etc/crail/secret", "secret"))
    loaded.metadata(), loaded.storage(), loaded.mount()
