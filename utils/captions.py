"""What is asked about every picture: one question an attribute."""

QUESTIONS = {
    "upper": "what is the person wearing on the upper body?",
    "lower": "what is the person wearing on the lower body?",
    "shoes": "what shoes is the person wearing?",
    "hair": "what hair does the person have?",
    "carried": "what is the person carrying?",
    "hat": "what is the person wearing on the head?",
    "action": "what is the person doing?",
    "view": "from which side is the person seen?",
    "scene": "where is the person?",
}
