"""Common English words, chosen for kvbench: keys of needles, and lists to count in."""

from __future__ import annotations

from random import Random

_ADJECTIVES = """
amber ancient bitter blunt brave brief bright broad busy calm careful cheap clean clever cold crisp crooked curious
damp dark dear deep distant dizzy dry dull eager early empty even faint fair famous fancy fast fierce fine firm flat
fond fresh gentle giant glad golden grand grave great grim happy hardy harsh heavy hidden hollow honest humble hungry
idle keen kind large late lazy light little lively lonely long loud lucky mellow mild misty modest narrow neat noble
odd olive open pale patient plain polite proud quick quiet rapid rare ready rich ripe rough round royal rusty salty
sandy sharp shiny short shy silent silver simple sleepy slim slow small smooth soft solid sour spare steady steep
stiff still stormy strange strict strong sudden sunny sweet swift tall tame tender thick thin tidy tiny tired tough
true uneven upper usual vague vast violet vivid warm weak wet white wide wild windy wise wooden young
"""
_NOUNS = """
acorn anchor apple apron arrow autumn badge baker ball banner barn barrel basin basket beach beacon bean bear bell
bench berry birch blanket board boat bone bonnet bottle bowl branch brass bread breeze brick bridge broom brush bucket
butter button cabin cable cake camel candle canvas carpet cart castle cedar cellar chain chair chalk cheese cherry
chest chimney circle clock cloth cloud clover coal coast coat coin collar column comb copper coral cork corner cotton
cradle crane cream creek crown crystal cup curtain cushion daisy desert desk dish ditch dock door dove drawer dress
drum duck dune eagle elbow engine evening falcon farm feather fence fern ferry field finger flag flame flask flint
flour flower flute forest fork fountain fox frame frost fruit garden garlic gate ginger glass glove goat grain grape
gravel guitar hammer harbor hare harvest hat hazel heron hill hinge honey hook horn horse hound house inkwell iron
island ivory jacket jar jewel jungle kettle key kitchen kite knife knot ladder lake lamp lantern leaf leather lemon
letter lily lion lizard lock log maple marble market marsh mast meadow medal melon metal mill mint mirror mitten moon
moss mountain mouse mug mushroom nail napkin necklace needle nest net night oak oar ocean onion orange orchard otter
oven owl oyster paddle page paint palace paper parcel parrot path peach pearl pebble pencil pepper piano pillar pillow
pilot pine pipe pitcher plank plate plum pocket pond poplar porch potato pottery powder prairie puddle pump quarry
quilt rabbit radish raft rain raven reef ribbon rice ring river road robin rocket roof root rope rose saddle sail
salmon sand saucer scarf school seed shadow shawl sheep shelf shell ship shirt shoe shore shovel sign silk sketch
slate sled sleeve smoke snail snow soap sofa soil spade spark sparrow spider spoon spring squirrel stable stair stamp
star statue steam stone storm stove straw stream street string sugar summer sunset swan table tailor tent thimble
thistle thread throne thumb ticket tiger timber toast tower trail train tray treasure tree trumpet trunk tulip tunnel
turtle valley vase velvet village vine violin wagon wall walnut watch water wave wheat wheel whistle willow window
winter wolf wool wreath yard yarn
"""
_VERBS = """
admire agree answer arrange arrive ask bake balance begin believe bend borrow bounce breathe build bury buy call carry
carve catch choose climb collect compare complete cook copy count cover cross cry dance decide deliver describe dig
divide draw dream drift drink drive drop earn eat enjoy enter escape explain explore fetch fill find finish fix float
fold follow forget forgive gather give glow grow guess guide hang help hide hold hope hum hunt imagine invite join
juggle jump kneel knock laugh launch lean learn leave lend lift listen live look lose march measure meet melt mend mix
move notice obey offer order own pack pass pause pay peel plant play point polish pour practice praise prepare press
promise protect pull push reach read receive remember remove repair repeat reply rescue rest return ride rise roll run
sail save scatter search sell send settle sew shake share shine shout sing sit skip sleep slide smile speak spend spin
splash stand start stay steal stir stop stretch study swim swing talk taste teach tell thank think throw touch travel
trust try turn visit wait wake walk wander wash weave whisper win wonder work wrap write yawn
"""

ADJECTIVES, NOUNS, VERBS = (tuple(words.split()) for words in (_ADJECTIVES, _NOUNS, _VERBS))


def key_word(random: Random) -> str:
    """A word of two, such as ``quiet-river``; there are some 56,000."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"


def list_words(count: int, random: Random) -> list[str]:
    """So many different words; words of two once the simple ones are used up."""
    simple = sorted({*ADJECTIVES, *NOUNS, *VERBS})
    if count <= len(simple):
        return random.sample(simple, count)
    found = dict.fromkeys(random.sample(simple, len(simple)))
    while len(found) < count:
        found[key_word(random)] = None
    return list(found)
