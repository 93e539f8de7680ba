from ks.files.layout import find_runs, run_files


def test_only_rank_folders_are_found_in_order(tmp_path):
    for name in ("rank_16", "rank_8", "rank_x", "other", "rank_2/seed_10", "rank_2/seed_9", "rank_2/seed_x", "rank_²"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rank_3").touch()
    found = [(rank, seed) for rank, seed, _ in find_runs(tmp_path)]
    assert found == [(2, None), (2, 9), (2, 10), (8, None), (16, None)]


def test_the_first_seed_is_in_the_rank_folder_itself_and_further_ones_below(tmp_path):
    first, second = run_files(tmp_path, 4, 7, 7), run_files(tmp_path, 4, 9, 7)
    assert first.final == tmp_path / "rank_4" / "rank_4_final.pth"
    assert second.final == tmp_path / "rank_4" / "seed_9" / "rank_4_final.pth"
    second.directory.mkdir(parents=True)
    assert find_runs(tmp_path, first_seed=7) == [(4, 7, first), (4, 9, second)]
