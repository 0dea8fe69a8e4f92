"""The mutants still find their lines; that tests notice them is seen by `tests/mutants.py` itself."""

import ast

from mutants import DRAWN, EQUIVALENT, NAMED, ROOT, drawn, subject_of


def test_every_mutant_finds_its_line_and_is_python():
    mutants = [*NAMED, *drawn()]
    assert len(mutants) == len(NAMED) + sum(DRAWN.values()) == len(set(mutants)) >= 96
    for mutant in mutants:
        assert mutant.line > 0
        assert mutant.old != mutant.new
        text = (ROOT / "evoopt" / mutant.file).read_text()
        ast.parse(text.replace(mutant.old, mutant.new))
        assert subject_of(mutant.file)
    listed = {(m.file, m.old.strip(), m.new.strip()) for m in mutants}
    assert set(EQUIVALENT) <= listed, "no longer drawn"
