"""Memory that is left, in folders like those of the kernel."""

from pathlib import Path

import pytest

from utils.media.memory import FALLBACK_BYTES, available_bytes, decoding_budget

GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """A machine with 50 GiB left. `group` writes the files of a control group, `left` what is left of it all."""

    class Machine:
        cgroup = tmp_path / "cgroup"
        own = tmp_path / "own"
        meminfo = tmp_path / "meminfo"

        def group(self, folder: str, **files: object) -> None:
            (self.cgroup / folder).mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (self.cgroup / folder / name.replace("__", ".")).write_text(f"{content}\n")

        def left(self) -> int:
            return available_bytes(self.cgroup, self.own, self.meminfo)

    Machine.meminfo.write_text(f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {50 * 2**20} kB\n")
    return Machine()


def test_of_a_machine_alone(machine):
    assert machine.left() == 50 * GIB


def test_version_2(machine):
    machine.own.write_text("0::/\n")
    machine.group("", memory__max=8 * GIB, memory__current=6 * GIB, memory__stat=f"anon 7\ninactive_file {GIB}\nx 1")
    assert machine.left() == 3 * GIB
    machine.group("", memory__max="max")
    assert machine.left() == 50 * GIB


def test_version_1(machine):
    machine.own.write_text("5:cpu,cpuacct:/job\n4:memory:/\n0::/\n")
    machine.group(
        "memory",
        memory__limit_in_bytes=8 * GIB,
        memory__usage_in_bytes=7 * GIB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {2 * GIB}",
    )
    assert machine.left() == 3 * GIB
    machine.group("memory", memory__limit_in_bytes=9223372036854771712)
    assert machine.left() == 50 * GIB


@pytest.mark.parametrize(
    ("line", "root", "names"),
    [
        ("0::/slurm/job_7", "", ("memory__max", "memory__current")),
        ("3:memory:/slurm/job_7", "memory/", ("memory__limit_in_bytes", "memory__usage_in_bytes")),
    ],
)
def test_the_lowest_limit_on_the_way_holds(machine, line, root, names):
    """That of a batch job, that of all jobs, or that of the machine."""
    machine.own.write_text(f"{line}\n")
    limit, used = names
    machine.group(f"{root}slurm/job_7", **{limit: 8 * GIB, used: 2 * GIB})
    machine.group(f"{root}slurm/job_8", **{limit: 1 * GIB, used: 1 * GIB})
    assert machine.left() == 6 * GIB
    machine.group(f"{root}slurm", **{limit: 8 * GIB, used: 5 * GIB})
    assert machine.left() == 3 * GIB
    machine.group(f"{root}slurm/job_7", **{limit: 8 * GIB, used: 9 * GIB})
    assert machine.left() == 0


def test_a_container_whose_group_has_its_name_outside(machine):
    machine.own.write_text("4:memory:/docker/0123\n")
    machine.group("memory", memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=GIB)
    assert machine.left() == 3 * GIB


def test_nothing_is_known(tmp_path):
    nowhere = Path(tmp_path / "nowhere")
    assert available_bytes(nowhere, nowhere, nowhere) == FALLBACK_BYTES


def test_processes_share_a_quarter():
    assert 0 < decoding_budget(4) <= available_bytes() / 8
