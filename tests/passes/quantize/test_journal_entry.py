"""What a method made of a weight comes back from the journal as it was."""

import pytest
import torch

from qcompile.formats import parse_format
from qcompile.passes.quantize.journal_entry import pack_outcome, unpack_outcome
from qcompile.passes.quantize.methods import Outcome


@pytest.mark.parametrize("name", ["int3-g16-asym", "nf4-g16-dq", "int4-g16+1xfp16"])
def test_outcome_comes_back_in_the_format_that_it_has(name):
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    format, asked = parse_format(name), parse_format("int3-g16-asym")
    entry = pack_outcome(Outcome(format.encode(weight), ("a note",)), {"error": 0.5})
    outcome, facts = unpack_outcome(asked, (4, 40), entry)
    assert (outcome.weight.format, outcome.notes, facts) == (format, ("a note",), {"error": 0.5})
    assert torch.equal(format.decode(outcome.weight), format.decode(format.encode(weight)))
