"""A small English world to learn from, written by rules: people, places, facts, numbers.

    words      the names and nouns of the world, its capitals, opposites, days
    chance     draws that are the same for the same seed, and which combinations are kept back
    stories    one person gives something to another; walks, talks, colours, who is where
    facts      capitals, opposites, days, months, sums, counting, agreement, the ultimate answer
    pages      all of it as documents to train on
    questions  what stands in no document, as prompts with their answers: the exam

No text of others is in it. Of the combinations that a model could merely remember (two names, a
place and a gift, two numbers, a noun beside another one) a tenth is kept back: they stand in no
document, and the questions are made of them. What a model answers there it has worked out.
"""

from pellucid.train.data.world.pages import PAGES, world_documents
from pellucid.train.data.world.questions import Question, world_questions

__all__ = ["PAGES", "Question", "world_documents", "world_questions"]
