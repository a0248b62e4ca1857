"""Relay: where the student's token is bad, the teacher takes over."""

from onpath.methods.relay.method import Relay

__all__ = ["Relay"]
