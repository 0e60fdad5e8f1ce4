"""Write seeded, synthetic chest-radiology reports: findings paired with the impression that they determine.

Nothing here comes from a patient. A report starts as a handful of sampled facts (an effusion, its side, size and
change, a misplaced tube, ...). Each fact knows several ways to say itself in the findings and one canonical way to be
summed up in the impression; normal organs, devices in good position and incidental remarks fill the rest. The
impression names the abnormal facts in order of urgency, so it can only be written by reading the findings.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path("models/data")
SEED = 2024
SPLITS = {"train": 2000, "validate": 200, "test": 200}
WORDS = range(50, 111)  # how long the findings may be
NORMAL = "no acute cardiopulmonary process"
NORMAL_SHARE = 0.17

SIDES = ("left", "right")
LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe", "lingula")
RIBS = ("third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
VERTEBRAE = ("t6", "t7", "t8", "t9", "t11", "t12", "l1")
SIZES = {"small": ("small", "small-volume"), "moderate": ("moderate", "moderate-sized"), "large": ("large", "sizable")}
GRADES = {"mild": ("mild", "slight"), "moderate": ("moderate",), "severe": ("severe", "marked")}
ADVERBS = {"mild": ("mildly", "slightly"), "moderate": ("moderately",), "severe": ("severely", "markedly")}

# How the findings say that something changed; {is} and {has} agree with the subject.
CHANGES = {
    "new": (
        "{is} new since the prior exam",
        "{was} not present previously",
        "{has} developed in the interval",
        "{was} not seen on the prior study",
    ),
    "unchanged": (
        "{is} unchanged",
        "{is} similar to the prior study",
        "{is} stable in the interval",
        "{has} not significantly changed",
    ),
    "increased": (
        "{has} increased since the prior exam",
        "{is} larger than on the prior study",
        "{has} grown in the interval",
        "{is} more extensive than before",
    ),
    "decreased": (
        "{has} decreased since the prior exam",
        "{is} smaller than on the prior study",
        "{has} diminished in the interval",
        "{is} less extensive than before",
    ),
    "worsened": (
        "{has} worsened since the prior exam",
        "{is} more pronounced than on the prior study",
        "{has} progressed in the interval",
    ),
    "improved": (
        "{has} improved since the prior exam",
        "{is} less pronounced than on the prior study",
        "{has} partly cleared in the interval",
    ),
}
# The same with the change up front.
CHANGES_FIRST = {
    "unchanged": ("no interval change in the {subject}", "again seen is the {subject}, unchanged", "stable {subject}"),
    "increased": ("interval increase in the {subject}", "interval enlargement of the {subject}"),
    "decreased": ("interval decrease in the {subject}", "interval reduction in the {subject}"),
    "worsened": ("interval worsening of the {subject}", "interval progression of the {subject}"),
    "improved": ("interval improvement in the {subject}", "interval partial clearing of the {subject}"),
}
SINGULAR = {"is": "is", "was": "was", "has": "has"}
PLURAL = {"is": "are", "was": "were", "has": "have"}
OF_SIZE = ("", "new", "unchanged", "increased", "decreased")
OF_DEGREE = ("", "new", "unchanged", "worsened", "improved")


@dataclass(frozen=True)
class Fact:
    """One abnormality: its text in the findings, its clause in the impression, and what it leaves not normal."""

    rank: int  # urgency; the impression lists low ranks first
    text: str
    clause: str
    affects: frozenset[str] = field(default_factory=frozenset)


class Draw:
    """The random choices of one report, and whether an earlier exam exists to compare with."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.prior = rng.random() < 0.75

    def pick(self, options: Sequence[str]) -> str:
        """One of the options, each as likely."""
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        """Whether an event of this probability happens."""
        return self.rng.random() < probability

    def change(self, kinds: Sequence[str]) -> str:
        """How a finding compares with the earlier exam; always "" where there is none."""
        return self.pick(kinds) if self.prior else ""

    def observe(self, sightings: Sequence[str], subject: str, change: str, plural: bool = False) -> str:
        """Say that something is seen and, if known, how it changed: in a clause, a sentence of its own, or up front."""
        if not change:
            return self.pick(sightings) + "."
        moved = self.pick(CHANGES[change]).format_map(PLURAL if plural else SINGULAR)
        pronoun = ("they", "these") if plural else ("this", "it")
        shapes = [f"{self.pick(sightings)}, which {moved}.", f"{self.pick(sightings)}. {self.pick(pronoun)} {moved}."]
        if change != "new":
            shapes.append(f"the {subject} {moved}.")
            shapes.append(self.pick(CHANGES_FIRST[change]).format(subject=subject.rstrip(",")) + ".")
        return self.pick(shapes)


def summed_up(thing: str, change: str) -> str:
    """The canonical clause for a thing and its change: "new x", or "x, increased"."""
    if change == "new":
        return f"new {thing}"
    return f"{thing}, {change}" if change else thing


def article(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return ("an " if phrase.startswith(("a", "e", "i", "o", "u", "8", "11 ", "18 ")) else "a ") + phrase


def pneumothorax(draw: Draw) -> Fact:
    """Air in the pleural space: side, size, place, change, and whether it is under tension."""
    side, size, place = draw.pick(SIDES), draw.pick(list(SIZES)), draw.pick(("", "apical ", "basilar "))
    said, change = draw.pick(SIZES[size]), draw.change(OF_SIZE)
    text = draw.observe(
        (
            f"there is {article(said)} {side} {place}pneumothorax",
            f"{article(said)} {place}pneumothorax is seen on the {side}",
            f"on the {side}, there is {article(said)} {place}pneumothorax",
            f"{article(said)} {side}-sided {place}pneumothorax is noted",
        ),
        f"{said} {side} {place}pneumothorax",
        change,
    )
    thing = f"{size} {side} {place}pneumothorax"
    if size == "large" and draw.chance(0.5):
        other = SIDES[side == "left"]
        text += draw.pick((f" the mediastinum is shifted to the {other}.", f" there is {other}ward mediastinal shift."))
        return Fact(0, text, summed_up(f"{thing} with mediastinal shift", change), frozenset({"air", "mediastinum"}))
    return Fact(1, text, summed_up(thing, change), frozenset({"air"}))


def free_air(draw: Draw) -> Fact:
    """Air under the diaphragm."""
    side = draw.pick(SIDES)
    text = draw.pick(
        (
            f"there is lucency beneath the {side} hemidiaphragm, consistent with free air.",
            f"free intraperitoneal air is seen under the {side} hemidiaphragm.",
            f"a crescent of free air outlines the {side} hemidiaphragm.",
        )
    )
    return Fact(
        2, text, f"free air under the {side} hemidiaphragm, surgical consultation advised", frozenset({"belly"})
    )


def misplaced_airway(draw: Draw) -> Fact:
    """An endotracheal tube that is too low, too high, or in a main bronchus."""
    kind = draw.pick(("low", "high", "bronchus"))
    if kind == "bronchus":
        text = draw.pick(
            (
                "the endotracheal tube tip lies in the right main bronchus.",
                "the tip of the endotracheal tube has entered the right mainstem bronchus.",
            )
        )
        return Fact(3, text, "right main bronchus intubation, tube retraction advised", frozenset({"airway"}))
    tenths = draw.rng.randrange(5, 19) if kind == "low" else draw.rng.randrange(75, 99)
    clause, advice = f"{kind} endotracheal tube", "retraction" if kind == "low" else "advancement"
    return Fact(4, airway_text(draw, tenths), f"{clause}, {advice} advised", frozenset({"airway"}))


def airway_text(draw: Draw, tenths: int) -> str:
    """Where the endotracheal tube ends; only the distance (in mm) tells whether that is right."""
    distance = f"{tenths / 10:.1f} cm"
    return draw.pick(
        (
            f"the endotracheal tube terminates {distance} above the carina.",
            f"the tip of the endotracheal tube is {distance} above the carina.",
            f"an endotracheal tube is in place with its tip {distance} above the carina.",
            f"endotracheal tube tip projects {distance} from the carina.",
        )
    )


def misplaced_feeding_tube(draw: Draw) -> Fact:
    """An enteric tube that stops short of the stomach or went down the airway."""
    if draw.chance(0.3):
        side = draw.pick(SIDES)
        text = draw.pick(
            (
                f"the enteric tube courses into the {side} lower lobe bronchus.",
                f"the tip of the nasogastric tube projects over a {side} lower lobe bronchus.",
            )
        )
        return Fact(3, text, f"enteric tube in the {side} lower lobe bronchus, removal advised", frozenset({"enteric"}))
    text = draw.pick(
        (
            "the enteric tube terminates in the distal esophagus.",
            "the nasogastric tube ends above the gastroesophageal junction, in the esophagus.",
            "the tip of the enteric tube is coiled in the esophagus.",
            "the nasogastric tube is looped within the mid esophagus.",
        )
    )
    return Fact(5, text, "enteric tube tip in the esophagus, advancement advised", frozenset({"enteric"}))


def misplaced_line(draw: Draw) -> Fact:
    """A central venous catheter with its tip where it should not be."""
    side, line = draw.pick(SIDES), draw.pick(LINES)
    place = draw.pick(("right atrium", "right ventricle", "azygos vein", "contralateral subclavian vein"))
    text = draw.pick(
        (
            f"a {side} {line} terminates in the {place}.",
            f"the tip of the {side} {line} lies within the {place}.",
            f"{side} {line} has its tip in the {place}.",
        )
    )
    return Fact(6, text, f"{side} {line} tip in the {place}, repositioning advised", frozenset({"line"}))


LINES = ("internal jugular catheter", "subclavian line", "picc")


def consolidation(draw: Draw) -> Fact:
    """Opacity in one or two lobes, taken for pneumonia."""
    lobes = draw.rng.sample(LOBES, 2 if draw.chance(0.25) else 1)
    where, change = " and ".join(lobes), draw.change(OF_DEGREE)
    look = draw.pick(("consolidation", "airspace opacity", "patchy opacity", "focal opacity", "dense consolidation"))
    text = draw.observe(
        (
            f"there is {look} in the {where} concerning for pneumonia",
            f"{look} is seen in the {where}, compatible with infection",
            f"{look} within the {where} suggests pneumonia",
            f"the {where} {'show' if len(lobes) > 1 else 'shows'} {look}, suspicious for pneumonia",
        ),
        f"{look} in the {where}, likely infectious,",
        change,
    )
    affects = {"lungs", *(lobe_side(lobe) for lobe in lobes)}
    return Fact(7, text, summed_up(f"{adjective(where)} pneumonia", change), frozenset(affects))


def adjective(lobes: str) -> str:
    """The lobes as they stand before a noun."""
    return lobes.replace("lingula", "lingular")


def lobe_side(lobe: str) -> str:
    """The lung a lobe belongs to; the lingula is part of the left one."""
    return "right lung" if lobe.startswith("right") else "left lung"


def edema(draw: Draw) -> Fact:
    """Fluid in both lungs."""
    grade, change = draw.pick(list(GRADES)), draw.change(OF_DEGREE)
    said, adverb = draw.pick(GRADES[grade]), draw.pick(ADVERBS[grade])
    text = draw.observe(
        (
            f"there is {said} pulmonary edema",
            f"{said} perihilar haziness and vascular indistinctness are consistent with pulmonary edema",
            f"the interstitial markings are {adverb} increased, in keeping with pulmonary edema",
            f"{said} pulmonary edema is present",
        ),
        f"{said} pulmonary edema",
        change,
    )
    affects = frozenset({"lungs", "left lung", "right lung", "vessels"})
    return Fact(8, text, summed_up(f"{grade} pulmonary edema", change), affects)


def effusion(draw: Draw) -> Fact:
    """Fluid in one or both pleural spaces, sometimes compressing the lung beside it."""
    size, change = draw.pick(list(SIZES)), draw.change(OF_SIZE)
    said = draw.pick(SIZES[size])
    if draw.chance(0.3):
        unequal = draw.pick(("", "", "left", "right"))
        lead = f", {unequal} greater than {SIDES[unequal == 'left']}" if unequal else ""
        text = draw.observe(
            (
                f"there are {said} bilateral pleural effusions{lead}",
                f"{said} pleural effusions are seen on both sides{lead}",
                f"{said} bilateral effusions are present{lead}",
            ),
            f"{said} bilateral pleural effusions{lead + ',' if lead else ''}",
            change,
            plural=True,
        )
        thing = f"{size} bilateral pleural effusions{lead}"
        return Fact(9, text, summed_up(thing, change), frozenset({"pleura", "left pleura", "right pleura"}))
    side = draw.pick(SIDES)
    text = draw.observe(
        (
            f"there is {article(said)} {side} pleural effusion",
            f"{article(said)} pleural effusion is present on the {side}",
            f"blunting of the {side} costophrenic angle reflects {article(said)} effusion",
            f"{article(said)} {side}-sided effusion layers posteriorly",
        ),
        f"{said} {side} pleural effusion",
        change,
    )
    thing, affects = f"{size} {side} pleural effusion", {"pleura", f"{side} pleura"}
    if draw.chance(0.3):
        thing += " with compressive atelectasis"
        affects |= {"lungs", f"{side} lung", "bases"}
        text += draw.pick((" adjacent compressive atelectasis is noted.", " the underlying lung is partly collapsed."))
    return Fact(9, text, summed_up(thing, change), frozenset(affects))


def rib_fracture(draw: Draw) -> Fact:
    """A recent break of one rib."""
    side, rib = draw.pick(SIDES), draw.pick(RIBS)
    text = draw.pick(
        (
            f"there is an acute fracture of the {side} {rib} rib.",
            f"a minimally displaced acute fracture involves the {side} {rib} rib.",
            f"acute cortical disruption of the {side} lateral {rib} rib is seen.",
        )
    )
    return Fact(10, text, f"acute {side} {rib} rib fracture", frozenset({"bones"}))


def vertebral_fracture(draw: Draw) -> Fact:
    """Loss of height of one vertebra."""
    level, grade, change = draw.pick(VERTEBRAE), draw.pick(list(GRADES)), draw.change(("", "new", "worsened"))
    said = draw.pick(GRADES[grade])
    text = draw.observe(
        (
            f"there is {article(said)} compression deformity of {level}",
            f"the {level} vertebral body shows {said} loss of height",
        ),
        f"{said} compression deformity of {level}",
        change,
    )
    return Fact(11, text, summed_up(f"{grade} {level} compression fracture", change), frozenset({"bones"}))


def mediastinal_mass(draw: Draw) -> Fact:
    """A wide mediastinum or a large hilum, each with the scan it calls for."""
    if draw.chance(0.4):
        text = draw.pick(
            (
                "the superior mediastinum is widened.",
                "there is widening of the mediastinum.",
                "the mediastinum is wide.",
            )
        )
        return Fact(6, text, "widened mediastinum, ct angiography advised", frozenset({"mediastinum"}))
    side = draw.pick((*SIDES, "bilateral"))
    hilum = "both hila are" if side == "bilateral" else f"the {side} hilum is"
    text = draw.pick((f"{hilum} enlarged, raising concern for adenopathy.", f"{hilum} full and lobulated in contour."))
    return Fact(13, text, f"{side} hilar enlargement, chest ct advised", frozenset({"mediastinum", "hila"}))


def nodule(draw: Draw) -> Fact:
    """A measured lung nodule, which needs a scan unless it is known and stable."""
    size, lobe = draw.rng.randrange(6, 26), draw.pick(LOBES)
    change = draw.change(("", "new", "unchanged", "increased"))
    text = draw.observe(
        (
            f"{article(f'{size} mm')} nodule is seen in the {lobe}",
            f"there is {article(f'{size} mm')} nodular opacity in the {lobe}",
            f"a rounded nodule in the {lobe} measures {size} mm",
        ),
        f"{size} mm nodule in the {lobe}",
        change,
    )
    clause = summed_up(f"{size} mm {adjective(lobe)} nodule", change) + (
        "" if change == "unchanged" else ", chest ct advised"
    )
    return Fact(12, text, clause, frozenset({"lungs", lobe_side(lobe), "nodules"}))


def atelectasis(draw: Draw) -> Fact:
    """Partial collapse at one or both lung bases."""
    side, grade, change = draw.pick((*SIDES, "bibasilar")), draw.pick(list(GRADES)), draw.change(OF_DEGREE)
    said, base = draw.pick(GRADES[grade]), "at both bases" if side == "bibasilar" else f"at the {side} base"
    where = side if side == "bibasilar" else f"{side} basilar"
    text = draw.observe(
        (
            f"there is {said} {where} atelectasis",
            f"{said} linear opacity {base} reflects atelectasis",
            f"{said} volume loss {base} is compatible with atelectasis",
            f"{said} plate-like atelectasis is seen {base}",
        ),
        f"{said} {where} atelectasis",
        change,
    )
    lungs = {"left lung", "right lung"} if side == "bibasilar" else {f"{side} lung"}
    return Fact(14, text, summed_up(f"{grade} {where} atelectasis", change), frozenset({"lungs", "bases"} | lungs))


def cardiomegaly(draw: Draw) -> Fact:
    """An enlarged heart."""
    grade, change = draw.pick(list(GRADES)), draw.change(("", "new", "unchanged", "worsened", "improved"))
    said, adverb = draw.pick(GRADES[grade]), draw.pick(ADVERBS[grade])
    text = draw.observe(
        (
            f"there is {said} cardiomegaly",
            f"the cardiac silhouette shows {said} enlargement",
            f"the heart shows {said} global enlargement",
        ),
        draw.pick((f"{said} cardiomegaly", f"{adverb} enlarged heart", f"{adverb} enlarged cardiac silhouette")),
        change,
    )
    if not change and draw.chance(0.6):
        text = draw.pick((f"the heart is {adverb} enlarged.", f"the cardiac silhouette is {adverb} enlarged."))
    return Fact(15, text, summed_up(f"{grade} cardiomegaly", change), frozenset({"heart"}))


def hyperinflation(draw: Draw) -> Fact:
    """Overexpanded lungs."""
    text = draw.pick(
        (
            "the lungs are hyperinflated with flattened hemidiaphragms.",
            "there is hyperexpansion of both lungs with an increased retrosternal airspace.",
            "lung volumes are increased and the diaphragms are flattened.",
        )
    )
    return Fact(16, text, "hyperinflated lungs suggesting copd", frozenset({"volumes"}))


def resolved(draw: Draw) -> Fact:
    """Something the earlier exam showed and this one does not."""
    side, size = draw.pick(SIDES), draw.pick(("small", "moderate", "large"))
    thing, region = draw.rng.choice((("pleural effusion", "pleura"), ("pneumothorax", "air"), ("pneumonia", "lungs")))
    text = draw.pick(
        (
            f"the previously seen {'' if thing == 'pneumonia' else size + ' '}{side} {thing} has resolved.",
            f"there has been complete interval resolution of the {side} {thing}.",
            f"the {side} {thing} described on the prior study is no longer seen.",
        )
    )
    return Fact(17, text, f"resolved {side} {thing}", frozenset({f"no {region}"}))


ABNORMALITIES: tuple[tuple[Callable[[Draw], Fact], float], ...] = (
    (pneumothorax, 9),
    (free_air, 2),
    (misplaced_airway, 5),
    (misplaced_feeding_tube, 4),
    (misplaced_line, 5),
    (consolidation, 13),
    (edema, 11),
    (effusion, 15),
    (rib_fracture, 4),
    (vertebral_fracture, 3),
    (mediastinal_mass, 5),
    (nodule, 7),
    (atelectasis, 10),
    (cardiomegaly, 12),
    (hyperinflation, 4),
    (resolved, 5),
)

# What can be said of regions that no fact affects; the pairs come first and may stand in for their parts.
NORMAL_TEXTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("pleura", "air"): (
        "there is no pleural effusion or pneumothorax.",
        "no pneumothorax or effusion is seen.",
        "there is neither effusion nor pneumothorax.",
    ),
    ("heart", "mediastinum"): (
        "the cardiomediastinal silhouette is normal.",
        "heart and mediastinum are unremarkable.",
        "the heart and mediastinal contours are within normal limits.",
    ),
    ("lungs", "vessels"): (
        "there is no focal consolidation or pulmonary edema.",
        "the lungs are clear and the pulmonary vasculature is normal.",
    ),
    ("heart",): (
        "the heart is normal in size.",
        "the cardiac silhouette is within normal limits.",
        "heart size is normal.",
        "the cardiac contour is not enlarged.",
        "there is no cardiomegaly.",
    ),
    ("mediastinum",): (
        "the mediastinal contours are unremarkable.",
        "mediastinal and hilar contours are within normal limits.",
        "the mediastinum is midline and not widened.",
        "no mediastinal shift is seen.",
    ),
    ("lungs",): (
        "the lungs are clear.",
        "no focal consolidation is seen.",
        "there is no evidence of pneumonia.",
        "both lungs are clear without focal opacity.",
        "no airspace opacity or nodule is identified.",
    ),
    ("left lung",): ("the left lung is clear.", "no focal opacity is seen in the left lung."),
    ("right lung",): ("the right lung is clear.", "no focal opacity is seen in the right lung."),
    ("pleura",): (
        "there is no pleural effusion.",
        "no effusion is seen on either side.",
        "the costophrenic angles are sharp.",
        "the pleural spaces are clear of fluid.",
    ),
    ("left pleura",): ("there is no left pleural effusion.", "the left costophrenic angle is sharp."),
    ("right pleura",): ("there is no right pleural effusion.", "the right costophrenic angle is sharp."),
    ("air",): (
        "no pneumothorax is identified.",
        "there is no pneumothorax.",
        "no evidence of pneumothorax on either side.",
    ),
    ("vessels",): (
        "the pulmonary vasculature is normal.",
        "there is no pulmonary edema.",
        "no vascular congestion or edema is seen.",
    ),
    ("bones",): (
        "the osseous structures are intact.",
        "no acute bony abnormality is seen.",
        "there is no acute fracture.",
        "visualized bones are unremarkable for age.",
    ),
    ("belly",): (
        "the upper abdomen is unremarkable.",
        "no free air is seen beneath the diaphragm.",
        "the visualized bowel gas pattern is normal.",
    ),
    ("volumes",): ("lung volumes are normal.", "the lungs are well expanded.", "inspiratory effort is adequate."),
}
# One side is called normal only where the other is not.
WHOLE = {"left lung": "lungs", "right lung": "lungs", "left pleura": "pleura", "right pleura": "pleura"}


def normal_texts(draw: Draw, affected: set[str]) -> list[str]:
    """A sentence for each region that is normal, or one for two of them."""
    texts, done = [], set(affected) | {side for side, whole in WHOLE.items() if whole not in affected}
    for regions, options in NORMAL_TEXTS.items():
        if done.isdisjoint(regions) and (len(regions) == 1 or draw.chance(0.3)):
            texts.append(draw.pick(options))
            done.update(regions)
    return texts


def comparison(draw: Draw) -> str:
    """What this exam is compared with."""
    if not draw.prior:
        return draw.pick(("no prior exams are available for comparison.", "there is no prior study for comparison."))
    days = draw.pick(("one day", "two days", "three days", "one week", "two weeks", "one month", "six months"))
    return draw.pick(
        (
            f"comparison is made to the study from {days} earlier.",
            f"the prior exam was performed {days} ago.",
            f"the film is compared with one obtained {days} before.",
        )
    )


def technique(draw: Draw) -> str:
    """How the film was taken, and why."""
    return draw.pick(
        (
            f"history of {draw.pick(('cough and fever', 'chest pain', 'shortness of breath', 'a recent fall'))}.",
            f"history of {draw.pick(SIDES)} lower lobe pneumonia last year.",
            "frontal and lateral views of the chest were obtained.",
            "a single portable frontal view of the chest was obtained.",
            "the patient is slightly rotated to the left.",
            "the patient is slightly rotated to the right.",
            "semi-upright portable technique limits evaluation.",
            "overlying monitoring leads partly obscure the chest.",
        )
    )


def incidental(draw: Draw) -> str:
    """A true remark that the impression leaves out: it looks like a fact, so that looks alone cannot decide."""
    side, lobe, rib = draw.pick(SIDES), draw.pick(LOBES), draw.pick(RIBS)
    return draw.pick(
        (
            f"a calcified granuloma in the {lobe} is unchanged.",
            f"there is an old healed fracture of the {side} {rib} rib.",
            f"remote {side} {rib} rib fracture is again seen.",
            f"{draw.pick(('mild', 'moderate'))} degenerative changes are seen in the thoracic spine.",
            "the aorta is tortuous and calcified.",
            "calcification of the aortic arch is present.",
            f"surgical clips project over the {side} upper quadrant.",
            f"{article(draw.pick(('small', 'moderate')))} hiatal hernia is noted.",
            f"{draw.pick(('mild', 'moderate'))} thoracic scoliosis is unchanged.",
            f"minimal scarring at the {side} apex is stable.",
            f"a nipple shadow projects over the {side} base.",
            f"{side} shoulder arthroplasty is partially imaged.",
            f"the {side} hemidiaphragm is chronically elevated.",
        )
    )


def quiet_device(draw: Draw) -> str:
    """A device that needs no comment in the impression."""
    side = draw.pick(SIDES)
    return draw.pick(
        (
            f"a {side} chest wall pacemaker has intact leads.",
            "median sternotomy wires are intact.",
            "a prosthetic aortic valve is in place.",
            "epicardial pacing wires are noted.",
            f"a loop recorder projects over the {side} hemithorax.",
        )
    )


def well_placed(draw: Draw) -> dict[str, str]:
    """Tubes and lines in standard position, by the region they belong to."""
    side, line = draw.pick(SIDES), draw.pick(LINES)
    vein = draw.pick(("mid superior vena cava", "lower superior vena cava", "cavoatrial junction"))
    return {
        "airway": airway_text(draw, draw.rng.randrange(30, 61)),
        "enteric": draw.pick(
            (
                "the enteric tube terminates in the stomach.",
                "the nasogastric tube courses below the diaphragm, with its tip in the gastric body.",
                "the tip of the enteric tube projects over the stomach.",
            )
        ),
        "line": draw.pick(
            (
                f"a {side} {line} terminates in the {vein}.",
                f"the tip of the {side} {line} lies within the {vein}.",
                f"{side} {line} has its tip at the {vein}.",
            )
        ),
    }


def sample_facts(draw: Draw) -> list[Fact]:
    """Zero to three facts that do not contradict each other, most urgent first."""
    if draw.chance(NORMAL_SHARE):
        return []
    wanted = draw.rng.choices((1, 2, 3), weights=(30, 42, 28))[0]
    makers, weights = zip(*ABNORMALITIES, strict=True)
    facts: list[Fact] = []
    affected: set[str] = set()
    chosen: set[Callable[[Draw], Fact]] = set()
    while len(facts) < wanted:
        make = draw.rng.choices(makers, weights=weights)[0]
        if make in chosen or (make is resolved and not draw.prior):
            continue
        fact = make(draw)
        clash = any(f"no {region}" in affected | fact.affects for region in affected | fact.affects)
        overlap = fact.affects & affected & {"mediastinum", "bases", "air", "bones"}
        if clash or overlap:
            continue
        facts.append(fact)
        chosen.add(make)
        affected |= fact.affects
    return sorted(facts, key=lambda fact: fact.rank)


def sum_up(facts: Sequence[Fact], supported: bool) -> str:
    """The impression: the clauses in order, what they add up to, and that the rest is quiet if little was found."""
    clauses = [fact.clause for fact in facts]
    text = " ".join(clauses)
    if not clauses:
        clauses = [NORMAL] + (["lines and tubes in standard position"] if supported else [])
    elif "cardiomegaly" in text and "pulmonary edema" in text:
        clauses.append("findings suggest congestive heart failure")
    elif len(clauses) == 1:
        clauses.append(f"otherwise {NORMAL}")
    return ". ".join(clauses) + "."


def make_report(rng: random.Random) -> tuple[str, str]:
    """One report: (findings, impression)."""
    draw = Draw(rng)
    facts = sample_facts(draw)
    affected = {region for fact in facts for region in fact.affects}

    devices = [text for region, text in well_placed(draw).items() if draw.chance(0.22) and region not in affected]
    needed = [*(fact.text for fact in facts), *devices]
    if draw.prior or draw.chance(0.5):
        needed.append(comparison(draw))

    optional = [incidental(draw), incidental(draw), technique(draw), quiet_device(draw)]
    optional = draw.rng.sample(optional, draw.rng.choice((1, 2, 2, 3)))
    optional += normal_texts(draw, affected)
    draw.rng.shuffle(optional)

    goal = rng.randrange(WORDS.start, WORDS.stop - 10)
    words = sum(len(text.split()) for text in needed)
    while optional and words < goal:
        text = optional.pop()
        needed.append(text)
        words += len(text.split())
    draw.rng.shuffle(needed)
    return " ".join(needed), sum_up(facts, supported=bool(devices))


def make_reports(count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` reports as (findings, impression), no two with the same findings; the same seed gives the same ones."""
    rng = random.Random(seed)
    reports: dict[str, str] = {}
    while len(reports) < count:
        findings, impression = make_report(rng)
        if len(findings.split()) in WORDS:
            reports.setdefault(findings, impression)
    return list(reports.items())


def write_splits(folder: Path, seed: int) -> None:
    """Write all splits from one draw, so that no findings occur in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    reports = iter(make_reports(sum(SPLITS.values()), seed))
    for split, count in SPLITS.items():
        part = [next(reports) for _ in range(count)]
        for kind, lines in zip(("findings", "impression"), zip(*part, strict=True), strict=True):
            path = folder / f"{split}.{kind}.tok"
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the synthetic chest-radiology reports.")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the reports (default: %(default)s)")
    args = parser.parse_args()
    try:
        write_splits(args.out, args.seed)
    except OSError as error:
        parser.exit(1, f"error: cannot write the reports: {error}\n")
    print(f"wrote {', '.join(f'{count} {split}' for split, count in SPLITS.items())} reports to {args.out}")


if __name__ == "__main__":
    main()
