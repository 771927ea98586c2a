"""What the demo refuses rather than leave it out."""

from __future__ import annotations

import pytest

from chaos.campaigns.demo import DemoOptions, on_hosts
from elastic.cli.flags import Output
from membership.base.enums import Device
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit


def test_a_device_is_not_asked_of_several_hosts() -> None:
    with pytest.raises(ConfigError, match="--device goes with one host"):
        on_hosts(DemoOptions(hosts=2, device=Device.CPU), Output.JSON)
