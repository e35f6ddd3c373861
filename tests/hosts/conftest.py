"""Tests inside other trainers, each in an environment of its own (`make test-hosts`); skipped where it is missing."""

from __future__ import annotations

from hosts.cpu_torchvision import declare

declare()
