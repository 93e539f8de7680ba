"""The memory that is available in a container."""

from ks.files import memory


def test_what_a_container_uses_is_taken_off_its_limit_but_not_its_cached_files(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    without_limit = memory.available_bytes()
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() > without_limit / 2
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available_bytes() == 1_000_000
    (tmp_path / "memory.current").write_text("700000\n")
    assert memory.available_bytes() == 300_000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_anon 5\ninactive_file 150000\nactive_file 50000\n")
    assert memory.available_bytes() == 500_000
