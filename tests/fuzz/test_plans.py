"""Plans that were changed in an adapter's file, at random: refused by name, or as good as one of ours."""

import plans


def test_a_changed_plan_is_refused_or_works(tmp_path):
    judge = plans.run(250, seed=13, folder=tmp_path)
    assert not judge.escapes, judge.escapes
    assert judge.counts["accepted"] > 15 and judge.counts["refused"] > 100, judge.counts
