"""Which files must have which value while CPUs are exclusive: against a plain reading of the same rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.tuning.plan import FrequencyPolicy, Tunables, Tuning, plan

CPUFREQ = "sys/devices/system/cpu/cpufreq"
LATENCY = {cpu: f"sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us" for cpu in range(8)}


def policy(number: int, cpus: str, **more: object) -> FrequencyPolicy:
    known = {"governors": ("performance", "powersave"), "lowest_khz": 800_000, "highest_khz": 3_500_000, **more}
    return FrequencyPolicy(path=f"{CPUFREQ}/policy{number}", cpus=CpuSet.parse(cpus), **known)  # type: ignore[arg-type]


EACH = Tunables(policies=tuple(policy(cpu, str(cpu)) for cpu in range(8)), latency_paths=LATENCY)


def test_nothing_is_set_where_nothing_is_configured_or_exclusive() -> None:
    assert not plan(EACH, CpuSet.parse("0-7"), Tuning()).wanted
    assert not plan(EACH, EMPTY, Tuning(governor="performance", wakeup_us=0)).wanted


def test_no_latency_is_spelled_as_the_kernel_wants_it() -> None:
    """0 would mean the opposite there."""
    assert plan(EACH, CpuSet.parse("3"), Tuning(wakeup_us=0)).wanted == {LATENCY[3]: "n/a"}
    assert plan(EACH, CpuSet.parse("3"), Tuning(wakeup_us=20)).wanted == {LATENCY[3]: "20"}


def test_cpus_that_share_their_frequency_with_others_stay_as_they_are() -> None:
    machine = Tunables(policies=(policy(0, "0-3"), policy(4, "4-5")))
    found = plan(machine, CpuSet.parse("2-5"), Tuning(governor="performance"))
    assert found.wanted == {f"{CPUFREQ}/policy4/scaling_governor": "performance"}
    assert found.notes == ("CPUs 2-3: they stay as they are: CPUs 0-1 run at the same frequency and are not exclusive",)
    assert found.cpus == CpuSet.parse("4-5")


def test_a_frequency_beyond_a_cores_own_becomes_its_limit() -> None:
    slow = policy(4, "4", lowest_khz=400_000, highest_khz=2_000_000)
    found = plan(
        Tunables(policies=(policy(0, "0"), slow)), CpuSet.parse("0,4"), Tuning(min_khz=3_000_000, max_khz=9_000_000)
    )
    assert list(found.wanted.items()) == [
        (f"{CPUFREQ}/policy0/scaling_max_freq", "3500000"),
        (f"{CPUFREQ}/policy0/scaling_min_freq", "3000000"),
        (f"{CPUFREQ}/policy4/scaling_max_freq", "2000000"),
        (f"{CPUFREQ}/policy4/scaling_min_freq", "2000000"),
    ]


def test_what_the_machine_does_not_have_is_said() -> None:
    tuning = Tuning(governor="schedutil", preference="performance", wakeup_us=5)
    found = plan(Tunables(policies=(policy(0, "0"),)), CpuSet.parse("0-1"), tuning)
    assert not found.wanted and not found.cpus
    assert found.notes == (
        "CPU 0: there is no governor 'schedutil', only performance, powersave",
        "CPU 0: there is no energy performance preference 'performance', none",
        "CPU 1: the kernel does not control their frequency (there is no cpufreq policy)",
        "CPUs 0-1: the kernel does not limit their wake-up latency (there is no pm_qos_resume_latency_us)",
    )


@given(
    groups=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    exclusive=st.sets(st.integers(0, 7)),
    wakeup_us=st.none() | st.integers(0, 100),
)
def test_a_cpu_is_touched_only_while_it_and_all_that_follow_it_are_exclusive(
    groups: list[int], exclusive: set[int], wakeup_us: int | None
) -> None:
    members = {one: {cpu for cpu in range(8) if groups[cpu] == one} for one in groups}
    machine = Tunables(
        policies=tuple(policy(number, ",".join(map(str, sorted(cpus)))) for number, cpus in sorted(members.items())),
        latency_paths=LATENCY,
    )
    found = plan(machine, CpuSet(exclusive), Tuning(governor="performance", wakeup_us=wakeup_us))
    whole = {number for number, cpus in members.items() if cpus <= exclusive}
    governors = {f"{CPUFREQ}/policy{number}/scaling_governor" for number in whole}
    latencies = {LATENCY[cpu] for cpu in exclusive} if wakeup_us is not None else set()
    assert set(found.wanted) == governors | latencies
    assert set(found.cpus) == {cpu for number in whole for cpu in members[number]}
    assert bool(found.notes) == (set(found.cpus) != exclusive)
