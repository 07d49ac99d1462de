"""Phrasings: the many ways to ask the questions that the demo model is made for.

Every kind of question has two lists of cores, one for training and one that training never sees
and evaluation uses.  Beginnings, endings, synonyms, spelling and letter case vary on top of them.

Slots: {X} and {Y} are things with "the", {A} with "a", {N} the bare noun, {S} its plural, {R} a
place ("in the top left"), {D} a direction ("to the left of"), {P} a picture ("the first picture").
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple


class Phrasings(NamedTuple):
    """Cores of one kind of question, for training and held out."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CORES: dict[str, Phrasings] = {
    "color": Phrasings(
        _lines("""
            What color is {X}?
            What is the color of {X}?
            Which color does {X} have?
            Which color is {X}?
            What color does {X} have?
            Tell me the color of {X}.
            Can you tell me what color {X} is?
            Name the color of {X}.
            {X}: what color?
            What's the color of {X}?
            {N} color?
            color of {X}?
            Could you say which color {X} is?
            I want to know the color of {X}.
            Say the color of {X}.
            In what color is {X} drawn?
            What color is used for {X}?
            {X} is what color?
            What color would you say {X} is?
            Do you know the color of {X}?
            Give me the color of {X}.
            How is {X} colored?
            What color has {X}?
            Look at {X}. What color is it?
            There is {A}. What color is it?
            Which color has {X}?
            Please tell me which color {X} has.
            Determine the color of {X}.
            What color can you see on {X}?
            I need the color of {X}.
            {X}, what color is that?
            Find out which color {X} is.
            State the color of {X}.
            What color is seen on {X}?
            Say which color you see for {X}.
            {X} has which color?
        """),
        _lines("""
            Of what color is {X}?
            Please name the color that {X} has.
            Which color do you see on {X}?
            {X}, which color is it?
            I would like to hear what color {X} is.
            Identify the color of {X}.
        """),
    ),
    "shape": Phrasings(
        _lines("""
            What shape is {X}?
            What is the shape of {X}?
            Which shape is {X}?
            Which shape does {X} have?
            What is {X}?
            What kind of shape is {X}?
            Tell me the shape of {X}.
            Can you tell me what shape {X} is?
            Name the shape of {X}.
            {X}: what shape?
            What's the shape of {X}?
            What shape has {X}?
            What shape does {X} have?
            shape of {X}?
            {N} shape?
            Could you say which shape {X} is?
            I want to know the shape of {X}.
            What sort of shape is {X}?
            {X} is what shape?
            Do you know the shape of {X}?
            Give me the shape of {X}.
            What type of figure is {X}?
            Look at {X}. What shape is it?
            There is {A}. What shape is it?
            What form does {X} have?
            Which shape has {X}?
            Please tell me which shape {X} has.
            Determine the shape of {X}.
            I need the shape of {X}.
            {X}, what shape is that?
            Find out which shape {X} is.
            State the shape of {X}.
            What would you call the shape of {X}?
            What shape is seen for {X}?
            Say which shape you see for {X}.
            {X} has which shape?
        """),
        _lines("""
            Of what shape is {X}?
            Please name the shape that {X} has.
            Which kind of shape is {X}?
            {X}, which shape is it?
            I would like to hear what shape {X} is.
            Identify the shape of {X}.
        """),
    ),
    "count": Phrasings(
        _lines("""
            How many {S} are there?
            How many {S} do you see?
            How many {S} can you see?
            Count the {S}.
            Count all {S}.
            What is the number of {S}?
            What number of {S} are there?
            How many {S}?
            number of {S}?
            Tell me how many {S} there are.
            Can you count the {S}?
            Can you tell me how many {S} there are?
            Please count how many {S} are shown.
            How many {S} are shown?
            How many {S} does it show?
            How many {S} does the picture have?
            How many {S} does the image contain?
            How many {S} are in there?
            I want to know how many {S} there are.
            Give me the number of {S}.
            {S}: how many?
            What's the number of {S}?
            What is the count of {S}?
            Say how many {S} you see.
            How many {S} have been drawn?
            Determine the number of {S}.
            I need to know how many {S} there are.
            Find out how many {S} there are.
            Please say how many {S} it has.
            What is the amount of {S}?
            {S}, how many are there?
            Add up the {S}.
            How many {S} would you count?
            How many {S} are seen?
            What is the total of all {S}?
            How many {S} in total?
            How many {S} are found here?
            All in all, how many {S} are visible?
        """),
        _lines("""
            Could you count up the {S}?
            How many {S} can be seen?
            How many {S} can you find?
            What is the total number of {S}?
            Please tell me the number of {S}.
            {S}, how many of them are there?
        """),
    ),
    "exist": Phrasings(
        _lines("""
            Is there {A}?
            Is there any {N}?
            Are there any {S}?
            Do you see {A}?
            Can you see {A}?
            Do you see any {S}?
            Does the picture show {A}?
            Does the image contain {A}?
            Does it have {A}?
            Is {A} shown?
            Is {A} in there?
            Is {A} visible?
            Tell me if there is {A}.
            Can you tell me whether there is {A}?
            any {S}?
            {A}: yes or no?
            Are there {S}?
            I wonder if there is {A}.
            Check if there is {A}.
            Is {A} present?
            Could there be {A}?
            Can you spot {A}?
            There is {A}, right?
            Do you find {A}?
            Has somebody drawn {A}?
            Find out if there is {A}.
            Please tell me if you see {A}.
            Is it possible to see {A}?
            Are {S} shown?
            Does this show {A}?
            Am I right that there is {A}?
            I think there is {A}. Is there?
            Say whether there are any {S}.
            Can {A} be found?
            Does one see {A}?
            Is {A} to be seen?
            True or not: there is {A}.
            Are {S} to be found?
        """),
        _lines("""
            Is it true that there is {A}?
            Are any {S} visible?
            Can you find {A}?
            Please check whether you see {A}.
            Does this contain any {S}?
            Would you say that there is {A}?
        """),
    ),
    "place": Phrasings(
        _lines("""
            Where is {X}?
            Where's {X}?
            Where do you see {X}?
            Where can I find {X}?
            In which part of the picture is {X}?
            In what part of the image is {X}?
            What is the position of {X}?
            What is the location of {X}?
            Tell me where {X} is.
            Can you tell me where {X} is?
            {X}: where?
            {N} position?
            Where is {X} located?
            Where is {X} placed?
            Locate {X}.
            Find {X}.
            I want to know where {X} is.
            Say where {X} is.
            Whereabouts is {X}?
            Which part of the picture holds {X}?
            At which place is {X}?
            In which region is {X}?
            Give me the location of {X}.
            location of {X}?
            Where should I look for {X}?
            Please tell me in which part {X} is.
            Determine the place of {X}.
            Find out where {X} is.
            I need the position of {X}.
            {X}, where do you see it?
            State the location of {X}.
            Can you find {X} and say where it is?
            In which corner or part of it is {X}?
            Where can you see {X}?
            {X} is seen where?
            Where is {X} to be found?
            In what area is {X}?
            Where does one see {X}?
        """),
        _lines("""
            Where can {X} be seen?
            Please say in which part {X} is.
            In which area of the picture do you see {X}?
            {X}, where is it?
            Whereabouts can I see {X}?
            Could you locate {X}?
        """),
    ),
    "region": Phrasings(
        _lines("""
            What is {R}?
            What do you see {R}?
            What's {R}?
            What can you see {R}?
            What object is {R}?
            Which object is {R}?
            Which shape is {R}?
            Is there anything {R}?
            Do you see anything {R}?
            Tell me what is {R}.
            Can you tell me what is {R}?
            What is located {R}?
            What is shown {R}?
            Describe what is {R}.
            {R}: what is there?
            What is there {R}?
            What lies {R}?
            Name the thing {R}.
            I want to know what is {R}.
            What has been drawn {R}?
            What is placed {R}?
            Say what you see {R}.
            Which things are {R}?
            Look {R}. What is there?
            What is seen {R}?
            What is to be found {R}?
            Which objects are visible {R}?
        """),
        _lines("""
            What can be found {R}?
            Please tell me what you see {R}.
            {R}, what do you see?
            Which thing do you find {R}?
            What is visible {R}?
        """),
    ),
    "relation": Phrasings(
        _lines("""
            What is {D} {X}?
            What do you see {D} {X}?
            What's {D} {X}?
            Which object is {D} {X}?
            Which objects are {D} {X}?
            Is there anything {D} {X}?
            What can you see {D} {X}?
            Tell me what is {D} {X}.
            Can you tell me what is {D} {X}?
            What is located {D} {X}?
            Which shape is {D} {X}?
            What things are {D} {X}?
            What lies {D} {X}?
            Name everything {D} {X}.
            I want to know what is {D} {X}.
            What is there {D} {X}?
            Do you see anything {D} {X}?
            Say what is {D} {X}.
            What is seen {D} {X}?
            What is to be found {D} {X}?
            Which objects are visible {D} {X}?
            What has been drawn {D} {X}?
        """),
        _lines("""
            What can be found {D} {X}?
            Please tell me what you see {D} {X}.
            Which shapes do you find {D} {X}?
            What is placed {D} {X}?
        """),
    ),
    "relation check": Phrasings(
        _lines("""
            Is {X} {D} {Y}?
            Do you see {X} {D} {Y}?
            Is {X} located {D} {Y}?
            Tell me if {X} is {D} {Y}.
            Can you tell me whether {X} is {D} {Y}?
            Does {X} lie {D} {Y}?
            {X} is {D} {Y}, right?
            Check if {X} is {D} {Y}.
            I wonder if {X} is {D} {Y}.
            Would you say {X} is {D} {Y}?
            Is it right that {X} is {D} {Y}?
        """),
        _lines("""
            Is it true that {X} is {D} {Y}?
            Is {X} placed {D} {Y}?
            Please check whether {X} is {D} {Y}.
        """),
    ),
    "size": Phrasings(
        _lines("""
            Is {X} small or large?
            Is {X} large or small?
            Is {X} big or small?
            How big is {X}?
            How large is {X}?
            What size is {X}?
            What is the size of {X}?
            Which size does {X} have?
            Tell me the size of {X}.
            {N} size?
            size of {X}?
            Tell me how big {X} is.
            Can you tell me what size {X} is?
            What size does {X} have?
            I want to know how large {X} is.
            Name the size of {X}.
            Do you find {X} big or little?
            Give me the size of {X}.
        """),
        _lines("""
            Of what size is {X}?
            Would you call {X} large or small?
            {X}, how big is it?
            Please say how large {X} is.
        """),
    ),
    "larger": Phrasings(
        _lines("""
            Which is larger, {X} or {Y}?
            Which is bigger, {X} or {Y}?
            Which one is larger, {X} or {Y}?
            What is larger, {X} or {Y}?
            What is bigger: {X} or {Y}?
            Which one is bigger, {X} or {Y}?
            Is {X} or {Y} larger?
            Is {X} or {Y} bigger?
            {X} or {Y}: which one is larger?
            {X} or {Y}, which is bigger?
            Tell me which is larger, {X} or {Y}.
            Which of the two is larger, {X} or {Y}?
            Compare the sizes of {X} and {Y}.
            Compare {X} and {Y}: which is larger?
            Who is bigger, {X} or {Y}?
            Can you tell me which is bigger, {X} or {Y}?
            Between {X} and {Y}, which is larger?
        """),
        _lines("""
            Which has the larger size, {X} or {Y}?
            Of {X} and {Y}, which one is bigger?
            Please tell me what is larger, {X} or {Y}.
        """),
    ),
    "list": Phrasings(
        _lines("""
            What objects are there?
            Which objects are there?
            What shapes are there?
            Which shapes do you see?
            What shapes can you see?
            List the objects.
            List all shapes.
            Name the objects.
            Name all the shapes.
            What things are there?
            Which things can you see?
            Which objects does it contain?
            Make a list of the objects.
            Give me a list of the shapes.
            What objects do you see?
            Which figures are shown?
            Enumerate the shapes.
            shapes?
            List everything.
            What shapes are seen?
            Which objects are visible?
            Which things are to be found?
        """),
        _lines("""
            What objects can be seen?
            Please list all the things.
            Which shapes can you find?
            Give me all the objects as a list.
        """),
    ),
    "colors": Phrasings(
        _lines("""
            What colors are there?
            Which colors do you see?
            What colors can you see?
            List the colors.
            Name all colors.
            Which colors are used?
            What colors do the objects have?
            What colors are the shapes?
            Which colors does it contain?
            Tell me the colors.
            colors?
            Which colors are shown?
            Give me a list of the colors.
            What are the colors of the objects?
            What colors are seen?
            Which colors are to be found?
            What colors are visible?
        """),
        _lines("""
            What colors can be seen?
            Please list all the colors.
            Which colors can you find?
        """),
    ),
    "describe": Phrasings(
        _lines("""
            Describe the image.
            Describe the picture.
            Describe this picture in detail.
            Describe what you see.
            Describe it.
            What do you see?
            What can you see?
            What is in the picture?
            What's in this image?
            What does the picture show?
            What is shown in the image?
            Tell me about this picture.
            Tell me what you see.
            Give me a description of the image.
            Can you describe the image?
            Could you describe this picture for me?
            What is this?
            What is going on in the picture?
            Explain the picture.
            What is on the picture?
            description?
            Write a caption.
            Say what is in the image.
            What is here?
            I want a description of this picture.
            Describe everything in the picture.
            What does this image contain?
            Describe the scene.
            Tell me everything about the image.
            Please describe this.
            I need a description.
            Give me a full description of what you see.
            Describe all of it.
            How does the picture look?
            What would you say is in this image?
            Tell me in words what is shown.
            Describe everything that you see here.
            What can you tell me about the picture?
            Give a detailed description of this image.
            What is seen here?
            What do we see?
            What is visible in the image?
            Say what is depicted.
            What can one see in the picture?
            What is found in this picture?
            How do you describe it?
        """),
        _lines("""
            Please give a description of what is in the picture.
            How would you describe this image?
            What can be seen in this picture?
            Give me a detailed description.
            Describe all that you can see.
            What is depicted here?
            Tell me what the image shows.
        """),
    ),
}

# What may follow words such as "tell me"; combined with all of REQUESTS for training.
CLAUSES: dict[str, tuple[str, ...]] = {
    "color": (
        "what color {X} is",
        "which color {X} has",
        "the color of {X}",
        "what color is seen on {X}",
        "how {X} is colored",
        "what color you see for {X}",
    ),
    "shape": (
        "what shape {X} is",
        "which shape {X} has",
        "the shape of {X}",
        "what kind of shape {X} has",
        "what {X} is",
        "what shape you see for {X}",
    ),
    "count": (
        "how many {S} there are",
        "the number of {S}",
        "how many {S} are seen",
        "how many {S} you can see in total",
        "the total of all {S}",
        "how many {S} are visible",
    ),
    "exist": (
        "if there is {A}",
        "whether there is {A}",
        "if you see any {S}",
        "whether {A} is visible",
        "whether {A} can be found",
        "if it is true that it has {A}",
    ),
    "place": (
        "where {X} is",
        "where {X} is located",
        "in which part {X} is seen",
        "the place of {X}",
        "where {X} is visible",
        "in which area {X} is",
        "where you can see {X}",
    ),
    "region": (
        "what is {R}",
        "what you see {R}",
        "which object is found {R}",
        "what is visible {R}",
    ),
    "relation": (
        "what is {D} {X}",
        "what you see {D} {X}",
        "which objects are found {D} {X}",
        "what is visible {D} {X}",
    ),
    "relation check": (
        "if {X} is {D} {Y}",
        "whether {X} is {D} {Y}",
        "if it is true that {X} lies {D} {Y}",
    ),
    "size": ("how big {X} is", "what size {X} has", "if {X} is small or large", "the size of {X}"),
    "larger": (
        "which is larger, {X} or {Y}",
        "whether {X} or {Y} is bigger",
        "which has the bigger size, {X} or {Y}",
    ),
    "list": (
        "which shapes there are",
        "what objects you see",
        "the objects as a list",
        "which things are found",
    ),
    "colors": ("which colors there are", "what colors you see", "all the colors"),
    "describe": (
        "what is in the picture",
        "what you see",
        "what is seen in this image",
        "about the picture",
        "what the picture shows",
        "in detail what is depicted",
        "everything that is visible",
    ),
}
REQUESTS = (
    "Tell me",
    "Please tell me",
    "Can you tell me",
    "Could you tell me",
    "Would you tell me",
    "Will you say",
    "Say",
    "Please say",
    "I want to know",
    "I would like to know",
    "I'd like to hear",
    "I need to know",
    "Let me know",
    "Do you know",
    "Can you say",
    "Could you please say",
    "Please check",
    "Find out",
    "Let us see",
    "Show me that you know",
    "I ask you",
    "My question is",
    "Please answer",
    "Can you find out",
    "Could you work out",
    "Please give me",
    "Help me and say",
    "Hello, please tell me",
)


FOLLOW_UPS: dict[str, Phrasings] = {
    "color": Phrasings(
        _lines("""
            What color is it?
            And what color is it?
            Which color does it have?
            What is its color?
            and its color?
            What color?
            Tell me its color.
            Which color is that one?
            And the color?
            What color does it have?
        """),
        _lines("""
            Which color is it?
            And what is its color?
            What color is that?
        """),
    ),
    "shape": Phrasings(
        _lines("""
            What shape is it?
            And what shape is it?
            Which shape does it have?
            What is its shape?
            and its shape?
            What shape?
            Tell me its shape.
            What kind of shape is it?
            And the shape?
        """),
        _lines("""
            Which shape is it?
            And what is its shape?
            What shape is that?
        """),
    ),
    "place": Phrasings(
        _lines("""
            Where is it?
            And where is it?
            Where?
            Where do you see it?
            Where is it located?
            and where?
            In which part of the picture is it?
            What is its position?
            Tell me where it is.
            And the position?
        """),
        _lines("""
            And where can I find it?
            Where is that?
            Where exactly is it?
        """),
    ),
    "size": Phrasings(
        _lines("""
            Is it large or small?
            And how big is it?
            What size is it?
            How large is it?
            What is its size?
            and its size?
            Is it big or small?
            Tell me its size.
        """),
        _lines("""
            How big is it?
            And is it small or large?
            What size does it have?
        """),
    ),
    "others": Phrasings(
        _lines("""
            Are there any others?
            Is there anything else?
            What else is there?
            What else do you see?
            Anything else?
            And the others?
            Are there other objects?
            Do you see anything else?
            What other shapes are there?
            Is that all?
            Are there more objects?
            Any others?
        """),
        _lines("""
            Can you see anything else?
            Which other objects are there?
            And what else is there?
        """),
    ),
    "same": Phrasings(
        _lines("""
            And {X}?
            What about {X}?
            And what about {X}?
            How about {X}?
            {X}?
            and for {X}?
            Now {X}.
            The same for {X}.
        """),
        _lines("""
            So what about {X}?
            And how about {X}?
        """),
    ),
    "same count": Phrasings(
        _lines("""
            And {S}?
            And how many {S}?
            What about {S}?
            How about {S}?
            {S}?
            and the {S}?
        """),
        _lines("""
            And what about {S}?
            So how many {S}?
        """),
    ),
}

PAIR_CORES: dict[str, Phrasings] = {
    "pair more": Phrasings(
        _lines("""
            Which picture has more {S}?
            Which image has more {S}?
            Which one has more {S}?
            Which picture shows more {S}?
            In which picture are there more {S}?
            Where do you see more {S}, in the first or in the second picture?
            Which of the two pictures has more {S}?
            Are there more {S} in the first or the second picture?
            Compare the number of {S}.
            Tell me which picture has more {S}.
            more {S}: first or second?
            Which image contains more {S}?
        """),
        _lines("""
            Which of these images has more {S}?
            In which of the two images do you see more {S}?
            Please say which picture contains more {S}.
        """),
    ),
    "pair which": Phrasings(
        _lines("""
            Which picture has {A}?
            Which image has {A}?
            Which one has {A}?
            Which picture shows {A}?
            In which picture is {A}?
            In which image do you see {A}?
            Where is {A}, in the first or in the second picture?
            Which of the two pictures contains {A}?
            Tell me which picture has {A}.
            In which of them is there {A}?
            {A}: first or second picture?
        """),
        _lines("""
            Which of these images shows {A}?
            In which picture can you see {A}?
            Which of the two has {A}?
        """),
    ),
    "pair difference": Phrasings(
        _lines("""
            What is the difference?
            What is different?
            Compare the two pictures.
            Compare the images.
            What is the difference between the two pictures?
            How do the images differ?
            What differs?
            Tell me the difference between the pictures.
            How many objects are in each picture?
            Compare them.
            How are the two pictures different?
        """),
        _lines("""
            In what way do the two images differ?
            What are the differences between the images?
            Please compare both pictures.
        """),
    ),
    "pair describe": Phrasings(
        _lines("""
            Describe {P}.
            What is in {P}?
            What do you see in {P}?
            What does {P} show?
            Tell me about {P}.
            Describe what you see in {P}.
            Can you describe {P}?
            What can you see in {P}?
        """),
        _lines("""
            What can be seen in {P}?
            Give me a description of {P}.
        """),
    ),
    "pair both": Phrasings(
        _lines("""
            Describe the pictures.
            Describe both images.
            Describe the two pictures.
            What do you see?
            What is in the pictures?
            What do the images show?
            Tell me about both pictures.
            Describe them.
        """),
        _lines("""
            What can be seen in these pictures?
            Describe each image.
        """),
    ),
}

_PREFIXES = Phrasings(
    (
        "Please, ",
        "Please ",
        "Tell me, ",
        "Tell me: ",
        "Hey, ",
        "Hi! ",
        "OK, ",
        "So, ",
        "Well, ",
        "Now, ",
        "And ",
        "Look at the picture: ",
        "Look at this image. ",
        "Looking at the picture, ",
        "In this picture, ",
        "In the image, ",
        "Quick question: ",
        "One question: ",
        "Next: ",
        "Question: ",
        "I have a question. ",
        "Here is a picture. ",
        "Can you help me? ",
        "Excuse me, ",
        "Thanks. ",
    ),
    (
        "Alright, ",
        "Hello! ",
        "Please look at the picture. ",
        "In this image, ",
        "Another question: ",
    ),
)
_SUFFIXES = Phrasings(
    (
        " in this picture",
        " in the picture",
        " in the image",
        " in this image",
        " in the photo",
        " here",
        " please",
        ", please",
        " in the drawing",
        " that you see",
        " on the picture",
        " in it",
        " now",
        " exactly",
        " in this scene",
        " there",
        " shown above",
        " that I gave you above",
        " in the above image",
    ),
    (" in the given image", " in this photo", " in the picture above", " on this picture"),
)
_PICTURE_SUFFIX = re.compile(r"picture|image|photo|scene|drawing|\bit\b|\bhere\b|\bthere\b")

SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle",) * 8 + ("disc", "dot", "round shape", "ball"),
    "square": ("square",) * 10 + ("box",),
    "triangle": ("triangle",),
    "star": ("star",),
    "object": ("object", "object", "shape", "shape", "thing", "figure", "item"),
    "large": ("large", "large", "big"),
    "small": ("small", "small", "little", "tiny"),
    "purple": ("purple",) * 6 + ("violet",),
}

PLACES: dict[str, tuple[str, ...]] = {
    "top left": (
        "in the top left",
        "in the top left corner",
        "in the upper left",
        "at the top left",
        "on the top left",
        "in the upper left corner",
        "top left",
    ),
    "top center": (
        "in the top center",
        "at the top center",
        "in the top middle",
        "in the upper middle",
        "at the top in the middle",
        "top center",
    ),
    "top right": (
        "in the top right",
        "in the top right corner",
        "in the upper right",
        "at the top right",
        "on the top right",
        "in the upper right corner",
        "top right",
    ),
    "center left": (
        "in the center left",
        "in the middle left",
        "at the middle left",
        "on the left in the middle",
        "at the center left",
        "center left",
    ),
    "center": (
        "in the center",
        "in the middle",
        "at the center",
        "in the very middle",
        "in the center of the picture",
        "in the middle of the image",
    ),
    "center right": (
        "in the center right",
        "in the middle right",
        "at the middle right",
        "on the right in the middle",
        "at the center right",
        "center right",
    ),
    "bottom left": (
        "in the bottom left",
        "in the bottom left corner",
        "in the lower left",
        "at the bottom left",
        "on the bottom left",
        "in the lower left corner",
        "bottom left",
    ),
    "bottom center": (
        "in the bottom center",
        "at the bottom center",
        "in the bottom middle",
        "in the lower middle",
        "at the bottom in the middle",
        "bottom center",
    ),
    "bottom right": (
        "in the bottom right",
        "in the bottom right corner",
        "in the lower right",
        "at the bottom right",
        "on the bottom right",
        "in the lower right corner",
        "bottom right",
    ),
    "left": ("on the left", "on the left side", "at the left", "in the left third"),
    "right": ("on the right", "on the right side", "at the right", "in the right third"),
    "top": ("at the top", "in the top row", "in the upper part", "in the top third"),
    "bottom": ("at the bottom", "in the bottom row", "in the lower part", "in the bottom third"),
}

DIRECTIONS: dict[str, tuple[str, ...]] = {
    "to the left of": ("to the left of", "left of", "on the left of", "on the left side of"),
    "to the right of": ("to the right of", "right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "higher than", "above"),
    "below": ("below", "under", "lower than", "beneath", "underneath"),
}

PICTURES: dict[str, tuple[str, ...]] = {
    "first": (
        "the first picture",
        "the first image",
        "picture one",
        "image 1",
        "picture 1",
        "the first one",
    ),
    "second": (
        "the second picture",
        "the second image",
        "picture two",
        "image 2",
        "picture 2",
        "the second one",
    ),
}


def article(noun: str) -> str:
    """The noun with "a" or "an" in front."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def synonym(rng: random.Random, word: str) -> str:
    """The word, or another one for the same thing."""
    return rng.choice(SYNONYMS.get(word, (word,)))


def _affixes(core: str, rng: random.Random, held_out: bool) -> str:
    choose = rng.random()
    if choose < 0.18:
        prefix = rng.choice(_PREFIXES.held_out if held_out else _PREFIXES.train)
        first = core.split(" ", 1)[0]
        core = prefix + (core if first == "I" else core[0].lower() + core[1:])
    if rng.random() < 0.18 and core[-1] in "?.":
        suffix = rng.choice(_SUFFIXES.held_out if held_out else _SUFFIXES.train)
        if not (_PICTURE_SUFFIX.search(core) and _PICTURE_SUFFIX.search(suffix)):
            core = core[:-1] + suffix + core[-1]
    return core


def _spelling(text: str, rng: random.Random) -> str:
    if rng.random() < 0.45:
        text = text.replace("color", "colour").replace("Color", "Colour")
    if rng.random() < 0.35:
        text = text.replace("center", "centre").replace("Center", "Centre")
    style = rng.random()
    if style < 0.55:
        return text[0].upper() + text[1:]
    if style < 0.78:
        return text.lower()
    if style < 0.93:
        return text.lower().rstrip("?.")
    if style < 0.97:
        return text[0].upper() + text[1:].rstrip("?.")
    return text.upper()


def _typo(text: str, rng: random.Random) -> str:
    """Now and then two letters change places or one is missing."""
    if len(text) < 8 or rng.random() > 0.02:
        return text
    i = rng.randrange(2, len(text) - 2)
    return (
        text[:i]
        + (text[i + 1] + text[i] if rng.random() < 0.5 else "")
        + text[i + 2 - (rng.random() < 0.5) :]
    )


FILLERS = tuple(
    [
        "please",
        "just",
        "kindly",
        "now",
        "so",
        "maybe",
        "actually",
        "really",
        "quickly",
        "again",
        "then",
        "well",
    ]
)
DISPENSABLE = frozenset(
    [
        "the",
        "is",
        "of",
        "do",
        "you",
        "can",
        "me",
        "that",
        "a",
        "does",
        "are",
        "there",
        "it",
        "i",
        "to",
        "tell",
    ]
)


# Beginnings of requests that another verb could stand for.
VERBS = _words("name tell say give state determine find locate list describe count")
# Words that say nothing about shapes: a question is the same with one of them in it.
UNKNOWN = _words(
    """
    confirm verify recognise report specify mention indicate detect read provide present output
    estimate classify label extract recall guess note observe inspect examine analyse consider
    assess reveal spell announce declare establish ascertain discover notice distinguish clarify
    return print deliver hand point bring share offer repeat remind inform enlighten figure judge
    today here's okay ok hmm um great nice thanks friend buddy sir robot computer assistant model
    quick short brief simple exact precise correct real main single particular given specific
    certain actual current whole entire available respective clear obvious shown drawn
     displayed painted illustrated pictured located situated positioned sitting
    lying standing hiding appearing occurring existing featured included contained rendered
    canvas frame photograph snapshot screenshot illustration graphic figure file screen sheet
    still also too just even perhaps probably simply basically honestly kindly surely certainly
     roughly approximately currently actually properly carefully briefly correctly
     seeing looking looks appears seems exists occurs features includes represents
    my your our those such some
    """
)


def _loose(text: str, rng: random.Random) -> str:
    """Now and then a filler more, a small word less or a verb unheard of, as people write."""
    words = text.split(" ")
    if rng.random() < 0.14:
        filler = rng.choice(FILLERS if rng.random() < 0.4 else UNKNOWN)
        words.insert(rng.randrange(len(words) + 1), filler)
    if rng.random() < 0.07 and len(words) > 4:
        small = [i for i, word in enumerate(words) if word.lower() in DISPENSABLE]
        if small:
            words.pop(rng.choice(small))
    first = words[0].lower()
    if first in VERBS and rng.random() < 0.3:
        verb = rng.choice(UNKNOWN)
        words[0] = verb if words[0].islower() else verb.capitalize()
    return " ".join(words)


def phrase(
    cores: Phrasings,
    slots: dict[str, str],
    rng: random.Random,
    held_out: bool = False,
    kind: str = "",
) -> str:
    """One way to ask, with beginnings, endings, spelling and letter case varied."""
    core = rng.choice(cores.held_out if held_out else cores.train)
    clauses = CLAUSES.get(kind, ())
    if clauses and not held_out and rng.random() < 0.3:
        core = f"{rng.choice(REQUESTS)} {rng.choice(clauses)}{rng.choice('?.')}"
    core = core.format(**slots)
    text = _spelling(_affixes(core, rng, held_out), rng)
    return text if held_out else _typo(_loose(text, rng), rng)
