"""What travels between a node of a Ray cluster and the driver; test_ray.py has the cluster."""

from ks.study.ray_cluster import _Changes, _write_files

RESULTS = ("rank_2_final.pth", "trackio/kronecker_sparse.db", "tensorboard/rank_2/events.out", "wandb/run-1/run.wandb")
STAY = (".rank_2.lock", "seed_1/rank_2_final.pth", "trackio/.hidden")


def test_results_and_the_files_of_trackers_travel_once(tmp_path):
    node, driver = tmp_path / "node", tmp_path / "driver"
    _write_files(node, {name: name.encode() for name in (*RESULTS, *STAY)})
    (node / "wandb" / "latest-run").symlink_to("run-1")
    changes = _Changes(node)
    _write_files(driver, changes.read())
    found = {path.relative_to(driver).as_posix(): path.read_text() for path in driver.rglob("*") if path.is_file()}
    assert found == {name: name for name in RESULTS}
    assert changes.read() == {}
    (node / RESULTS[1]).write_text("more")
    assert changes.read() == {RESULTS[1]: b"more"}
