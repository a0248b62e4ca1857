"""Privileged and rewrite prompts in our own words: user messages with slots, replaceable by
`method.template`."""

TEMPLATES = {
    "hint": (
        "{problem}\n\nFor your eyes only, here is a worked solution that is known to be "
        "right:\n<reference>\n{solution}\n"
        "</reference>\n\nStudy it until you see why every step holds. Then put it aside and solve the "
        "problem yourself, step by "
        "step and in your own words; do not quote it or mention that you have seen it. Give the final answer "
        "in the usual form."
    ),
    "hint_answer": (
        "{problem}\n\nFor your eyes only: the right final answer is {answer}.\n\nDerive it yourself, step by "
        "step, and make sure "
        "that each step holds by itself; do not mention that you knew the answer. Give the final answer in "
        "the usual form."
    ),
    "rewrite": (
        "Below are a problem and an attempt at it. Write the attempt anew so that it is "
        "right.\n\n<problem>\n{problem}\n"
        "</problem>\n\n<attempt>\n{attempt}\n</attempt>\n\nStay as close to the attempt as you can: the same "
        "approach, the same "
        "order of steps, the same tone. Leave every step that is right as it is. Where a calculation or an "
        "inference is wrong, "
        "correct it and carry the correction through all that follows. Write the rewritten solution only, "
        "without remarks about "
        "the attempt, and end with the final answer in the form that the problem asks for."
    ),
    "rewrite_with_reference": (
        "Below are a problem, a reference solution that is known to be right, and an attempt. Write the "
        "attempt anew so that it "
        "is "
        "right.\n\n<problem>\n{problem}\n</problem>\n\n<reference>\n{solution}\n</reference>\n\n<attempt>\n{attempt}\n"
        "</attempt>\n\nStay as close to the attempt as you can: the same approach, the same order of steps, "
        "the same tone. Leave "
        "every step that is right as it is. Where the attempt departs from what the reference shows to be "
        "true, correct it and "
        "carry the correction through all that follows; agree with the reference, but do not mention it. "
        "Write the rewritten "
        "solution only, and end with the final answer in the form that the problem asks for."
    ),
}
