"""Progress inside a cell reaches the notebook's bar, and the log has everything."""

import io

from tqdm import tqdm

from grass_lib.runner import status
from grass_lib.runner.status import Followed


def test_the_last_bar_is_shown(monkeypatch):
    monkeypatch.setattr(status, "_SECONDS", 0.0)
    log, terminal = io.StringIO(), io.StringIO()
    with tqdm(total=3, desc="run", file=terminal, bar_format="{desc}: {n_fmt}/{total_fmt} cells [{postfix}]") as bar:
        followed = Followed(log)
        texts = [
            "a warning: 3% of something\n",
            "\rnetworks:   0%|          | 0/8 [00:00<?]\rnetworks:  25%|##        | 2/8 [00:01<00:03]",
            "plain text\n",
        ]
        for text in texts:
            followed.write(text)
        assert followed.shown == "networks 25%"
        bar.update()
        assert (followed.shown, bar.n, bar.postfix) == ("", 1, "")
    assert "networks 25%" in terminal.getvalue()
    assert log.getvalue() == "".join(texts)


def test_it_is_not_shown_too_often(monkeypatch):
    followed, now = Followed(io.StringIO()), [10.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    for seconds, share, shown in ((0, "1%", "x 1%"), (0.1, "2%", "x 1%"), (0.6, "3%", "x 3%")):
        now[0] = 10.0 + seconds
        followed.write(f"\rx:   {share}|  | 1/3")
        assert followed.shown == shown
