"""Hosts for shaped links: they reach each other, send no faster than told, and leave nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks import namespaces, scaling_links

TALK = """
import socket, sys
here, there, first = sys.argv[1:]
if first == "listen":
    with socket.create_server((here, 7000)) as server:
        print("ready", flush=True)
        taken, _ = server.accept()
        with taken:
            print(sum(iter(lambda: len(taken.recv(1 << 16)), 0)), flush=True)
else:
    with socket.create_connection((there, 7000)) as line:
        line.sendall(bytes(300_000))
"""
needs_hosts = pytest.mark.skipif(
    namespaces.missing() is not None, reason="needs root and network namespaces"
)


@needs_hosts
def test_hosts_reach_each_other_on_slow_links_and_leave_nothing() -> None:
    with namespaces.hosts(2) as made:
        made.shape(50)
        shown = subprocess.check_output(
            ["tc", "-n", made.names[0], "qdisc", "show", "dev", namespaces.DEVICE], text=True
        )
        assert "tbf" in shown and "rate 50Mbit" in shown
        run = [sys.executable, "-c", TALK, made.address(0), made.address(0)]
        with subprocess.Popen(
            made.command(0, *run, "listen"), stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            subprocess.run(made.command(1, *run, "send"), check=True, timeout=60)
            assert server.stdout.readline() == "300000\n"
        names = [*made.names, made.switch]
    left = subprocess.check_output(["ip", "netns", "list"], text=True).split()
    assert not set(names) & set(left)


@needs_hosts
def test_what_a_killed_process_left_is_found() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    name = f"{namespaces.PREFIX}-{gone.pid}-0"
    subprocess.run(["ip", "netns", "add", name], check=True)
    assert name in namespaces.left_over()
    with namespaces.hosts(1) as made:
        assert made.names[0] not in namespaces.left_over()
    assert name not in namespaces.left_over()


def test_without_root_it_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(namespaces.shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(sys, "argv", ["scaling_links"])
    assert scaling_links.main() == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("run it as root")
