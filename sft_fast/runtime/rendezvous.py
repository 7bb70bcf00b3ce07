"""A warning when MASTER_ADDR is a public address: torch's rendezvous has no authentication."""

import ipaddress
import os
import socket


def public_address_warning() -> str:
    """The warning; "" where the address is private, or not known here."""
    name = os.environ.get("MASTER_ADDR", "")
    try:
        address = ipaddress.ip_address(socket.gethostbyname(name)) if name else None
    except OSError:
        return ""
    if address is None or not address.is_global:
        return ""
    return (
        f"warning: MASTER_ADDR {name} is a public address; whoever reaches its port can take part "
        "in the run and read its traffic. Use an address of a private network"
    )
