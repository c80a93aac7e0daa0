"""The checks of `gpkit.check_penalty`: each runs a penalty and says what it measured."""

from gpkit.doctor.gradcheck.report import PenaltyError as PenaltyError
from gpkit.doctor.gradcheck.report import PenaltyReport as PenaltyReport
