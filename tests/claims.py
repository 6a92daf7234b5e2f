"""Every claim of every study, by its text: asserted in the quick form, or left open for a reason.

`problems` compares what a run claims with this list. A claim that is asserted and does not hold, that is missing or reworded,
or that nobody listed fails with its text.
"""

import difflib
from dataclasses import dataclass, field

# why a claim is not asserted
FEW = "the quick form has too few seeds, prompts or steps to decide it; in the full form it holds (docs/gallery.md)"
FALSE = "measured, and it does not hold in the full form (docs/gallery.md)"
UNSURE = "measured, and the full form leaves it undecided (docs/gallery.md)"
LONG = "only the full form makes it"


@dataclass(frozen=True)
class Listed:
    """Claims of one study: asserted, open (with the reason), or asserted and true in the quick form but not in the full one.

    The last happens where the full form takes more prompts, or texts of other kinds, and misses its bound by little.
    """

    asserted: list[str]
    open: dict[str, str] = field(default_factory=dict)
    quick_only: list[str] = field(default_factory=list)

    def texts(self, quick: bool = True) -> set[str]:
        return {*self.asserted, *self.quick_only, *(text for text, why in self.open.items() if not (quick and why == LONG))}


LANGUAGE = {
    "cancellation": Listed(
        ["GRPO's forces are the gradients' inner products times c (identity; docs/theory.md, The decomposition)"],
        {
            "Right and wrong answers have like shares of tokens that rise (arXiv 2605.08666, token flipping)": UNSURE,
            "A token's change is not decided by its own advantage alone (arXiv 2605.08666)": FEW,
            "Tokens of right and wrong answers are coupled chiefly where they are identical and unconfident "
            "(arXiv 2605.08666)": FEW,
            "Opposing signals cancel at tokens that right and wrong answers share (arXiv 2605.08666)": UNSURE,
            "and less at tokens specific to right answers (arXiv 2605.08666)": FEW,
            "which are reinforced more (arXiv 2605.08666)": FEW,
        },
    ),
    "ches-filter": Listed(
        ["CHES is the readout's force without its factor <g, g> (identity; docs/theory.md, The kernel)"],
        {
            "Pairs with a low score displace the chosen answer less (arXiv 2410.08847 §4)": FEW,
            "Filtering by CHES beats random filtering (arXiv 2410.08847 §4, §6)": UNSURE,
            "The score ranks single pairs by displacement (arXiv 2410.08847 §4)": FEW,
        },
    ),
    "disentanglement-band": Listed(
        [
            "Preference losses share their update directions and differ in two weights (identity; arXiv 2604.18239)",
            "The band tells whether a step lifts the chosen and lowers the rejected answer (arXiv 2604.18239)",
            "Calibrated weights lift the chosen and lower the rejected answer at every pair "
            "(identity, ρ < 1; arXiv 2604.18239)",
        ],
        {
            "Margin losses press the chosen answer down with the rejected one "
            "(arXiv 2604.18239, likelihood displacement)": UNSURE,
            "Trained so, the chosen answers stay higher while the rejected ones fall "
            "(arXiv 2604.18239, reward calibration)": FEW,
        },
    ),
    "dpo-decay": Listed(
        [
            "Off-policy DPO presses the rejected answer down most (arXiv 2407.10490 §4.2)",
            "The margin between chosen and rejected answer grows (the loss is minimised)",
        ],
        {
            "The chosen answer falls late (arXiv 2407.10490 §4.2)": FALSE,
            "The first choice rises while the rejected answer falls: squeezing (arXiv 2407.10490 §4.2)": UNSURE,
            "On-policy DPO squeezes less than off-policy DPO (arXiv 2407.10490 §4.2 and §3.3)": UNSURE,
            "So do the other losses, and SPIN (arXiv 2407.10490 §4.2; docs/theory.md, Phenomena)": FALSE,
        },
    ),
    "entropy-collapse": Listed(
        ["The exact forces on the entropy predict a real step (docs/theory.md, Observables and parts)"],
        {
            "Likely tokens of right answers lower the entropy (arXiv 2505.22617, Theorem 1)": FEW,
            "Unlikely tokens of right answers raise it (arXiv 2505.22617, Theorem 1)": UNSURE,
            "A token's covariance of log-probability and advantage ranks its effect on the entropy (arXiv 2505.22617 §3)": FEW,
            "A few tokens of high covariance do most of it (arXiv 2505.22617 §4)": UNSURE,
            "so that leaving them out spares entropy (arXiv 2505.22617 §4, against random tokens)": FEW,
            "One GRPO step lowers the policy's entropy along its answers (arXiv 2505.22617 §2)": FEW,
            "In GRPO training the entropy falls while the reward grows (arXiv 2505.22617 §2)": LONG,
        },
    ),
    "extended-sft": Listed(
        ["Training on both answers lifts the rejected ones out of the valley (arXiv 2407.10490 §5)"],
        {
            "The chosen answers then stand higher in DPO (arXiv 2407.10490 §5)": FEW,
            "and decay more slowly (arXiv 2407.10490 §5; docs/theory.md, Phenomena)": FALSE,
            "The first choice takes less of the mass (arXiv 2407.10490 §5)": FEW,
        },
    ),
    "gradient-exchangeability": Listed(
        [
            "One function of the token's own ratio for all answers cancels what they share (identity; arXiv 2604.13088)",
            "Weights coupled to the sequence leave a push on shared tokens (arXiv 2604.13088)",
        ],
        {
            "So does asymmetric clipping (arXiv 2604.13088)": FEW,
            "and the drift is one of the whole network (arXiv 2604.13088, reward-irrelevant drift)": UNSURE,
        },
    ),
    "grpo-forces": Listed(
        [
            "An NTHR score is a gradient product (identity; docs/theory.md, The kernel)",
            "Where wrong answers share the working of right ones it takes the lift away (arXiv 2505.18830 §4, its mechanism)",
        ],
        {
            "The negative gradient holds the right answers back (LLD; arXiv 2505.18830 §4)": FALSE,
            "The exact force of the wrong answers' tokens says what they do to the right ones "
            "(docs/theory.md, Phenomena)": UNSURE,
            "NTHR finds the harmful tokens (arXiv 2505.18830 §5)": FEW,
            "Reweighting NTHR's tokens lowers the displacement (arXiv 2505.18830 §5; docs/theory.md, Phenomena)": FEW,
            "and that because of which tokens it spares (arXiv 2505.18830, random control)": FEW,
            "Behind a context of 1,000 tokens the exact forces predict the step as well (docs/theory.md, Phenomena)": LONG,
            "GRPO raises pass@1 and sharpens: the most likely token's mass grows (arXiv 2510.14807 §3)": FEW,
            "and pays with pass@K (arXiv 2510.14807 §3)": FALSE,
            "NTHR trains better than GRPO (arXiv 2505.18830 §6)": FEW,
        },
    ),
    "hallucination": Listed(
        [
            "SFT lifts the answer of another training prompt behind x_u (arXiv 2407.10490 §4.1)",
            "more than the answer of a prompt that is not trained on (arXiv 2407.10490 §4.1, irr_train against irr_test)",
        ],
        {"The exact force says so before the first step (docs/theory.md, Phenomena)": UNSURE},
    ),
    "interference": Listed(
        ["The exact forces between problems predict a real step (docs/theory.md, The decomposition)"],
        {
            "Learning some problems makes right answers to others less likely (arXiv 2510.02230, negative interference)": FEW,
            "and on the whole others' answers harm a problem (arXiv 2510.02230, decline of pass@k)": UNSURE,
            "The winner takes all: likely right answers are reinforced, unlikely ones suppressed "
            "(arXiv 2510.02230, in one update)": FALSE,
            "and so it is in training (arXiv 2510.02230)": LONG,
        },
    ),
    "masking": Listed(
        ["To first order the tenth that the scan masks takes most of the pull away (identity: the most negative forces)"],
        {
            "The chosen answers then fall less than without a mask": FEW,
            "and less than with as many tokens masked at random": FEW,
            "and less than with those that NTHR would spare (arXiv 2505.18830)": FALSE,
        },
    ),
    "degeneration": Listed(
        [],
        {
            "After DPO a model repeats itself more (arXiv 2407.10490 §4.2)": UNSURE,
            "and more than after as long a supervised training (arXiv 2407.10490 §4.2, control)": FEW,
            "The first choice takes the mass along what the model itself says (arXiv 2407.10490 §4.2)": UNSURE,
        },
    ),
    "hallucination-samples": Listed(
        ["It learns its own answers most (arXiv 2407.10490 §4.1)"],
        {
            "After SFT the model's answers hold phrases of other prompts' answers (arXiv 2407.10490 §4.1)": FEW,
            "and more of them than of answers that were not trained on (arXiv 2407.10490 §4.1, control)": FEW,
        },
    ),
    "longer-sft-worse-dpo": Listed(
        [
            "Supervised training makes the model peakier (arXiv 2407.10490 §4.2)",
            "DPO widens the margin after each (the loss is minimised)",
        ],
        {
            "The longer the SFT, the more the chosen answer loses in DPO (arXiv 2407.10490 §4.2)": FEW,
            "and the more the first choice rises (arXiv 2407.10490 §4.2)": FALSE,
        },
    ),
    "readout-vs-exact": Listed(
        [
            "The exact force is the sum over layers (identity)",
        ],
        {
            "First order is right: the exact force predicts a real step (docs/theory.md, The decomposition)": UNSURE,
            "NTHR finds the tokens whose penalty hurts the correct answer "
            "(arXiv 2505.18830 §4, with only the readout moving)": FEW,
            "CHES ranks pairs by how far the chosen answer is displaced (arXiv 2410.08847 §4.2)": FEW,
            "and not because both grow with the answer's length (arXiv 2410.08847 §4.2, its length-normalised form)": UNSURE,
            "The readout's force ranks the effect of token on token like the exact one (assumed by NTHR, CHES)": FALSE,
            "CH2 adds what the backbone does (Ren, Deng, Hong, Lyle, Gal 2026; stated there as an approximation)": FEW,
        },
    ),
    "rl-kernel": Listed(
        [
            "The readout's force is the representation part (h·h) <∂O/∂z, Γ>, and all parts add up "
            "(identity; docs/theory.md, The kernel)"
        ],
        {
            "Features vary little (arXiv 2601.04670)": FALSE,
            "so that through the representation part RL raises confidence at other problems too (arXiv 2601.04670)": UNSURE,
            "and the update as a whole does (arXiv 2601.04670)": UNSURE,
            "With the readout first, training raises confidence and reward faster (arXiv 2601.04670, CF-RL)": LONG,
        },
    ),
    "sft-dynamics": Listed(
        [
            "The chosen answer rises monotonically (arXiv 2407.10490 §4.1)",
        ],
        {
            "The order of words is learned, not words alone (arXiv 2407.10490 §4.1, the order of its curves)": FEW,
            "Answers similar to the chosen one rise with it at first (arXiv 2407.10490 §4.1)": UNSURE,
            "and then fall again (arXiv 2407.10490 §4.1)": FALSE,
            "Random words fall (arXiv 2407.10490 §4.1)": FALSE,
        },
    ),
    "shared-prefix": Listed(
        [
            "At a shared prefix DPO's two gradients cancel (identity; docs/theory.md, Contexts)",
            "Where the answers part, only the two tokens' logits are pushed, by β(1-a) (identity; docs/theory.md, Contexts)",
            "Through all parameters, attention included, the prefix pushes nothing (identity: same context, same Jacobian)",
            "Only losses with c⁺ = -c⁻ cancel: SimPO, KTO and SPPO do push the shared prefix (docs/theory.md, Objectives)",
        ],
        {"Squeezing needs the positions behind the divergence (docs/theory.md, Squeezing)": FEW},
    ),
    "simko": Listed(
        [
            "SimKO's ratio has the value of GRPO's (identity; arXiv 2510.14807 §4)",
            "Its gradient at a forking token of a right answer is shared with the candidates (identity; docs/theory.md, "
            "Objectives)",
        ],
        {
            "SimKO keeps more of pass@K than GRPO (arXiv 2510.14807 §4)": UNSURE,
            "at no cost in pass@1 (arXiv 2510.14807 §4)": UNSURE,
            "because it concentrates less (arXiv 2510.14807 §4)": UNSURE,
        },
    ),
    "token-taxonomy": Listed(
        ["A push's effect on its own logits' entropy has this closed form (identity; docs/theory.md, Observables and parts)"],
        {
            "Sign of advantage and peak or valley decide what a token does to the entropy (arXiv 2606.16154), "
            "at the logits": FEW,
            "Sign of advantage and peak or valley decide what a token does to the entropy (arXiv 2606.16154), own context": FEW,
            "Sign of advantage and peak or valley decide what a token does to the entropy (arXiv 2606.16154), "
            "all contexts": FEW,
            "Winners alone move the entropy less (arXiv 2606.16154, in one update)": FEW,
            "and in training, where they solve at least as much (arXiv 2606.16154, WAPO)": LONG,
        },
    ),
    "where-it-lives": Listed(
        ["The exact force is the sum over layers, and over kinds of parameters (identity; docs/explain.md)"],
        {
            "The readout carries the force between prompts "
            "(assumed by NTHR, arXiv 2505.18830, and CHES, arXiv 2410.08847)": FALSE,
            "and its sign tells the sign of the whole (assumed by NTHR, arXiv 2505.18830)": FALSE,
            "Fine-tuning leaves the force where it was: a share measured before it stands after it "
            "(an estimate's calibration)": UNSURE,
        },
    ),
}

CLASSIFICATION = {
    "compositional-generalisation": Listed(
        [
            "A compositional mapping carries over to unseen objects (arXiv 2409.09626 and thesis).",
            "Before the first step, the seen objects lift the messages of the unseen ones "
            "(arXiv 2409.09626 and thesis, by its forces).",
            "That force tells which mapping will carry over.",
        ],
    ),
    "noisy-images": Listed(
        [
            "A wrongly labelled image first approaches its true distribution and then leaves it "
            "(arXiv 2203.02485, on real images).",
            "At its closest the network sees through the label (arXiv 2203.02485, on real images).",
            "The way of a wrongly labelled image is longer than that of a right one (arXiv 2203.02485, on real images).",
            "The other images pull it to its class, its own gradient to the label, and the latter outlasts them "
            "(arXiv 2203.02485, on real images).",
        ],
    ),
    "digits": Listed(
        [
            "The change of log p is -η A K G up to O(η²) (arXiv 2407.10490 §2, eq. 4).",
            "While it learns a 4, the network also finds a 9 more like a 4 (arXiv 2407.10490 §2).",
            "Classes that look alike lift each other more than classes that do not (arXiv 2407.10490 §2).",
            "The most similar class is lifted more than the least similar one (arXiv 2407.10490 §2).",
        ],
    ),
    "causal-direction": Listed(
        [
            "A step lowers the loss by η Σ F, the forces of all tokens on all (identity; docs/theory.md, The decomposition).",
            "Tokens: an effect is learned from its cause sooner than the cause from it where several causes share an effect "
            "(after arXiv 2602.22254).",
            "Where several causes share an effect, the forces before the first step tell which direction is learned first.",
        ],
        {
            "y = f(x) + ε is fitted to 0.1 sooner than x from y, f an exponential (arXiv 2602.22254).": FALSE,
            "y = f(x) + ε is fitted to 0.1 sooner than x from y, f a cubic (arXiv 2602.22254).": FEW,
            "y = f(x) + ε is fitted to 0.1 sooner than x from y, f a sine (arXiv 2602.22254).": FEW,
            "y = f(x) + ε is fitted to 0.06 sooner than x from y, f an exponential (arXiv 2602.22254).": FEW,
            "y = f(x) + ε is fitted to 0.06 sooner than x from y, f a cubic (arXiv 2602.22254).": FEW,
            "y = f(x) + ε is fitted to 0.06 sooner than x from y, f a sine (arXiv 2602.22254).": FEW,
            "Tokens: an effect is learned from its cause sooner than the cause from it where every cause has its own effect "
            "(after arXiv 2602.22254).": UNSURE,
            "Tokens: an effect is learned from its cause sooner than the cause from it where every cause has its own effect, "
            "causes of unequal frequency (after arXiv 2602.22254).": FALSE,
        },
    ),
    "feature-adaptation": Listed(
        [
            "Features move by Δh_o = -(η/N) Σ K (∇_h z)ᵀ (p - e_y) + O(η²) (arXiv 2302.05779, eq. of the adaptation).",
            "The more energy is left after head probing, the further the features move (arXiv 2302.05779).",
            "They also turn further: the cosine of h and h₀ falls with the energy (arXiv 2302.05779).",
        ],
        {"With growing energy h·h₀ first rises and then falls (arXiv 2302.05779).": FEW},
    ),
    "feature-adaptation-tasks": Listed(
        [
            "Features move by their Jacobian times the step, up to O(η²) "
            "(arXiv 2302.05779, arXiv 2509.19554 chapter 6, the adaptation to first order).",
        ],
        {
            "The more energy is left after head probing, the further the features of pixels move "
            "(arXiv 2302.05779, arXiv 2509.19554 chapter 6).": FEW,
            "They also turn further: the cosine of h and h₀ falls with the energy, for pixels "
            "(arXiv 2302.05779, arXiv 2509.19554 chapter 6).": UNSURE,
            "The more energy is left after head probing, the further the features of rows move "
            "(arXiv 2302.05779, arXiv 2509.19554 chapter 6).": UNSURE,
            "They also turn further: the cosine of h and h₀ falls with the energy, for rows "
            "(arXiv 2302.05779, arXiv 2509.19554 chapter 6).": UNSURE,
            "The more energy is left after head probing, the further the features of strokes move "
            "(arXiv 2302.05779, arXiv 2509.19554 chapter 6).": FALSE,
            "They also turn further: the cosine of h and h₀ falls with the energy, for strokes "
            "(arXiv 2302.05779, arXiv 2509.19554 chapter 6).": FALSE,
        },
    ),
    "ntk-stability": Listed(
        [
            "The ranking of influences settles: neighbouring checkpoints agree more and more "
            "(arXiv 2407.10490, stability of the eNTK).",
            "LBK, seen from one real step, is a lower bound of η² ‖K‖² (arXiv 2407.10490, stability of the eNTK).",
            "One-step forces foresee the sign of a real change (arXiv 2407.10490, stability of the eNTK, SignDelta).",
        ],
        {
            "In fine-tuning the demo model the kernel keeps its direction "
            "(the assumption of the decomposition over several steps).": FALSE
        },
    ),
    "simko-tree": Listed(
        [
            "GRPO concentrates on one of the six rewarded paths (arXiv 2510.14807, toy experiment).",
            "Sharing a correct token's gradient with the other candidates keeps more rewarded paths "
            "(arXiv 2510.14807, toy experiment).",
            "SimKO's force on a correct token is ẽ - pi, ẽ = (1-α) e_y + (α/N) Σ e_top, and on a wrong rank-1 token λ times "
            "GRPO's (arXiv 2510.14807, toy experiment; γ⁺ and γ⁻) †.",
        ],
        {
            "SimKO with α = 0.01, λ = 1.1, the top 3 and the entropy gate keeps all six at accuracy 1 "
            "(arXiv 2510.14807, toy experiment).": FALSE
        },
    ),
    "simplicity-bias": Listed(
        [
            "The 8 compositional mappings are learned faster than the 16 others (arXiv 2409.09626 and thesis).",
            "Examples of a good mapping get on better with each other than those of a bad one (arXiv 2409.09626 and thesis).",
            "Examples of a bad mapping contradict each other (arXiv 2409.09626 and thesis).",
            "The forces before the first step tell which mapping will be fast.",
            "Right labels are learned faster than wrong ones (arXiv 2409.09626 and thesis).",
        ],
        {"Examples of a good mapping help each other (arXiv 2409.09626 and thesis).": FALSE},
    ),
    "squeezing": Listed(
        [
            "The toy experiment of the squeezing effect (arXiv 2407.10490 §3.3, notebook) has these probabilities and "
            "entropies.",
            "After a negative step p'_i/p_i = Σ_j exp z_j / Σ_j β_j exp z_j (arXiv 2407.10490 §3.3, lemma).",
            "A negative step always lowers its own token, and always lifts the argmax when that is another token "
            "(arXiv 2407.10490 §3.3).",
            "To first order another token i falls if and only if p_i < ‖p‖² - p(y⁻) (re-derived from that lemma).",
            "The peakier p is, the more of all other tokens fall (arXiv 2407.10490 §3.3).",
            "At fixed p, a less likely y⁻ makes the other tokens fall more (arXiv 2407.10490 §3.3).",
            "The paper's other half, that the argmax rises more when y⁻ is less likely (arXiv 2407.10490 §3.3), "
            "is false at fixed p †.",
            "On the demo model, a push through the readout alone squeezes as the toy says.",
            "An unlikely y⁻ squeezes also when all parameters move (arXiv 2407.10490 §3.3 argues with the readout's law).",
        ],
    ),
    "zig-zag": Listed(
        [
            "A wrongly labelled sample first approaches its true distribution and then leaves it "
            "(arXiv 2203.02485, zig-zag path).",
            "An easy sample goes straight to its label (arXiv 2203.02485).",
            "The turn has a cause in the decomposition: all other samples pull a wrongly labelled one to the truth, its own "
            "gradient pulls to the label and outlasts them (arXiv 2203.02485).",
            "Predictions averaged along the path (Filter-KD) are better targets than those of the trained teacher "
            "(arXiv 2203.02485).",
        ],
        {"With wrong labels, a student of Filter-KD's targets beats training on the labels (arXiv 2203.02485).": UNSURE},
    ),
}
CLAIMS = LANGUAGE | CLASSIFICATION


def problems(told: dict) -> list[str]:
    """What is wrong with a study's result.json, a line for each claim: not holding, missing, or not listed here."""
    study, listed = told["study"], CLAIMS[told["study"]]
    made = {claim["claim"]: claim for claim in told["claims"]}
    found = [
        f"{study}: {made[text]['verdict']}: {text!r}. Oracle: {made[text]['oracle']}. Measured: {made[text]['measured']}."
        for text in (*listed.asserted, *listed.quick_only) if text in made and made[text]["verdict"] != "holds"
    ]  # fmt: skip
    new = sorted(made.keys() - listed.texts(told["quick"]))
    for text in sorted(listed.texts(told["quick"]) - made.keys()):
        near = difflib.get_close_matches(text, new, 1, 0.5)
        found.append(f"{study}: missing: {text!r}" + (f", reworded as {near[0]!r}?" if near else ""))
    found += [f"{study}: not listed: {text!r}. Assert it in tests/claims.py, or say why not." for text in new]
    if len(made) < len(told["claims"]):
        found.append(f"{study}: two claims have the same text")
    return found
