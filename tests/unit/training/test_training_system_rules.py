"""Every profiler rule finds what it is for, lets a busy machine pass, and says what to use next time."""

import pytest

import system_rules
from system_rules import SYSTEM_RULES, Setup, SystemObservations

smdebug_rules = pytest.importorskip("smdebug_rulesconfig.profiler_rules.rules")

BUSY = {"cpu": [50.0] * 20, "io_wait": [1.0] * 20, "gpu": [95.0] * 20, "gpu_memory": [80.0] * 20, "cores": 4,
        "gpus": {"gpu0": [95.0] * 20}, "step_seconds": [0.1] * 50, "wait_seconds": [0.001] * 50,
        "start_up_seconds": 10.0}  # fmt: skip
IDLE = {"gpu": [5.0] * 20, "gpus": {"gpu0": [5.0] * 20}}
TRIGGERS = {
    "LowGPUUtilization": IDLE,
    "CPUBottleneck": {"cpu": [99.0] * 20, **IDLE},
    "IOBottleneck": {"io_wait": [80.0] * 20, **IDLE},
    "GPUMemoryIncrease": {"gpu_memory": [float(n) for n in range(20)]},
    "BatchSize": {"gpu": [30.0] * 20, "gpu_memory": [10.0] * 20},
    "Dataloader": {"wait_seconds": [0.05] * 50},
    "StepOutlier": {"step_seconds": [0.1] * 1000 + [2.0] * 11},
    "MaxInitializationTime": {"start_up_seconds": 1500.0},
    "LoadBalancing": {"gpus": {"gpu0": [95.0] * 20, "gpu1": [0.0] * 20}},
}
MEASURE_ONLY = {"OverallSystemUsage", "OverallFrameworkMetrics"}


def seen(**what):
    return SystemObservations(**{**BUSY, **what})


def test_every_rule_has_a_case():
    assert set(TRIGGERS) | MEASURE_ONLY == set(SYSTEM_RULES)


@pytest.mark.parametrize("name", TRIGGERS)
def test_rule_is_triggered_and_not(name):
    rule = SYSTEM_RULES[name]
    finding = rule.judge(seen(**TRIGGERS[name]))
    assert finding.status == "IssuesFound" and finding.advice and not finding.blocking
    assert rule.judge(seen()).status == "NoIssuesFound"


@pytest.mark.parametrize("name", sorted(SYSTEM_RULES))
def test_a_machine_without_gpu_and_samples_passes(name):
    assert SYSTEM_RULES[name].judge(SystemObservations()).status == "NoIssuesFound"


@pytest.mark.parametrize("name", sorted(set(SYSTEM_RULES) - {"OverallFrameworkMetrics"}))
def test_names_parameters_and_defaults_are_those_of_awss_package(name):
    theirs = getattr(smdebug_rules, name)().rule_parameters
    ours = SYSTEM_RULES[name].defaults
    assert {**theirs, **ours} == theirs | {key: ours[key] for key in ours.keys() - theirs.keys()}
    assert theirs.keys() - ours.keys() == {"rule_to_invoke", "scan_interval_us"}
    assert ours.keys() - theirs.keys() <= {"max_wait_percent"}


def test_a_gpu_that_waits_at_times_is_reported_after_a_whole_window_only():
    judge = SYSTEM_RULES["LowGPUUtilization"].judge
    stutter = [95.0, 95.0, 95.0, 0.0] * 400
    assert judge(seen(gpus={"gpu0": stutter[:1000]})).status == "NoIssuesFound"
    assert judge(seen(gpus={"gpu0": stutter})).evidence["tensor"] == "gpu0 GPUUtilization p5"


GPU = Setup(batch_size=16, pictures=2000, loader_workers=1, cores=4, unfreeze="all", instance_type="ml.g5.xlarge")


@pytest.mark.parametrize(
    ("name", "setup", "recommended"),
    [
        ("LowGPUUtilization", GPU, {"batch_size": 32}),
        ("LowGPUUtilization", Setup(unfreeze="none", instance_type="ml.g5.xlarge"), {"instance_type": "ml.c5.2xlarge"}),
        ("LowGPUUtilization", Setup(unfreeze="none"), {}),  # on a machine that it does not know
        ("BatchSize", GPU, {"batch_size": 32}),
        ("BatchSize", Setup(batch_size=24, pictures=2000), {"batch_size": 32}),
        ("BatchSize", Setup(batch_size=16, pictures=100), {}),  # an epoch of three steps teaches little
        ("CPUBottleneck", GPU, {"instance_type": "ml.g5.2xlarge"}),
        ("CPUBottleneck", Setup(instance_type="ml.g5.16xlarge"), {}),
        ("IOBottleneck", GPU, {"instance_type": "ml.g5.2xlarge"}),
        ("Dataloader", GPU, {"loader_workers": 2}),
        ("LoadBalancing", Setup(instance_type="ml.g5.12xlarge"), {"instance_type": "ml.g5.4xlarge"}),
        ("StepOutlier", GPU, {}),
    ],
)
def test_what_to_use_next_time(name, setup, recommended):
    assert SYSTEM_RULES[name].judged(seen(**TRIGGERS[name]), setup).recommendation == recommended
    assert SYSTEM_RULES[name].judged(seen(), setup).recommendation == {}


@pytest.mark.parametrize(("workers", "recommended"), [(1, {"loader_workers": 2}), (4, {}), (9, {"loader_workers": 4})])
def test_workers_that_are_too_few_or_too_many_for_the_cores(workers, recommended):
    what = seen(wait_seconds=[0.05] * 50, loader_workers=workers)
    setup = Setup(loader_workers=workers, cores=4)
    assert SYSTEM_RULES["Dataloader"].judged(what, setup).recommendation == recommended


def test_recommendations_of_all_rules_become_one():
    what = seen(cpu=[99.0] * 20, wait_seconds=[0.05] * 50, **IDLE)
    found = [rule.judged(what, GPU) for rule in SYSTEM_RULES.values()]
    assert system_rules.recommendation(found) == {
        "batch_size": 32, "loader_workers": 2, "instance_type": "ml.g5.2xlarge"
    }  # fmt: skip


def test_tables_of_the_rules_that_only_measure():
    what = seen(forward_seconds=[0.03] * 50, backward_seconds=[0.06] * 50)
    assert system_rules.overall_system_usage(what)["gpu"] == {"p99": 95, "p95": 95, "p50": 95, "max": 95, "min": 95}
    table = system_rules.overall_framework_metrics(what)
    assert list(table) == ["step", "data_wait", "forward", "backward"]
    assert table["backward"] == {"p99": 0.06, "p95": 0.06, "p50": 0.06, "max": 0.06, "total": 3.0}
