"""Which addresses images and videos are fetched from."""

from ipaddress import ip_address

import pytest

from minicpmv.serving.media import is_public


OWN = [
    "127.0.0.1",
    "10.0.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
]
OWN += ["::1", "::", "fd00::1", "fe80::1", "ff02::1", "ff0e::1", "::ffff:10.0.0.1", "2001:0:a00:1::", "64:ff9b:1::1"]
OWN += ["2002:7f00:1::", "2002:a00:1::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"]  # IPv4 addresses inside
PUBLIC = ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822", "2002:5db8:d822::1", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", OWN)
def test_an_address_of_an_own_network_is_not_public(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_of_the_internet_is_public(address):
    assert is_public(ip_address(address))
