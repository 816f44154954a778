"""The commonest case in the fewest passes over memory: forward KL at temperature 1 from all of a teacher's scores,
beside the true token.

With p the teacher and q the student, both softmax of scores, the slope of a KL(p | q) + b CE with the student's scores
is (a + b) q - a p - b [true token], and KL(p | q) is sum of p (teacher's scores - student's) plus the difference of
their normalisers. So each distribution is made once, without logarithms of it. Knows rows, no chunks and no models.
"""

import torch
from torch import Tensor


class MixedRows:
    """Some rows [r, V] of both scores. nats_r: KL(teacher | student). own_r, true_r: log-probability of the target by
    the student and by the teacher.

    The teacher's scores are used up; the student's are kept until `slopes`.
    """

    def __init__(self, student_rV: Tensor, teacher_rV: Tensor, targets_r: Tensor):
        targets_r1 = targets_r.unsqueeze(-1)
        self._logits_rV, self._targets_r1 = student_rV, targets_r1
        self._p_rV, self._q_rV = teacher_rV.softmax(-1), student_rV.softmax(-1)
        theirs_r, ours_r = _normaliser(teacher_rV, self._p_rV), _normaliser(student_rV, self._q_rV)
        self.true_r = teacher_rV.gather(1, targets_r1).squeeze(1) - theirs_r
        self.own_r = student_rV.gather(1, targets_r1).squeeze(1) - ours_r
        apart_rV = teacher_rV.sub_(student_rV)
        self.nats_r = apart_rV.mul_(self._p_rV).sum(-1) - theirs_r + ours_r

    def slopes(self, pull_r: Tensor, push_r: Tensor, *, whole: bool) -> None:
        """The student's scores become the slopes of the sum of pull x nats - push x own with them.

        whole: whether pull and push add up to 1 in every row, which saves passes.
        """
        pull_r1, push_r1 = pull_r.unsqueeze(-1), push_r.unsqueeze(-1)
        if whole:
            torch.addcmul(self._q_rV, self._p_rV, pull_r1, value=-1, out=self._logits_rV)
        else:
            slope_rV = torch.sub(self._q_rV, self._p_rV, out=self._p_rV).mul_(pull_r1)
            torch.addcmul(slope_rV, self._q_rV, push_r1, out=self._logits_rV)
        self._logits_rV.scatter_add_(1, self._targets_r1, -push_r1)


def _normaliser(scores_rV: Tensor, shares_rV: Tensor) -> Tensor:
    """[r]: the logarithm of the sum of exponentials, read off the largest share, which is never small."""
    return scores_rV.amax(-1) - shares_rV.amax(-1).log()
