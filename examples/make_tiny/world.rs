//! A small world and its text: who lives where, who has which animal and thing, who likes what.
//!
//! A [`Scene`] is drawn first: people with facts that tell them apart. Text only says what is true in its scene: first each
//! fact once, then what happens, which repeats facts in other words. To predict such a repetition a model has to look up
//! who or what it belongs to, the skill that questions ask for later.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

const NAMES: [(&str, &str, &str); 24] = [
    ("Anna", "She", "her"),
    ("Ben", "He", "his"),
    ("Clara", "She", "her"),
    ("David", "He", "his"),
    ("Emma", "She", "her"),
    ("Felix", "He", "his"),
    ("Greta", "She", "her"),
    ("Hugo", "He", "his"),
    ("Ida", "She", "her"),
    ("Jonas", "He", "his"),
    ("Lena", "She", "her"),
    ("Max", "He", "his"),
    ("Mia", "She", "her"),
    ("Noah", "He", "his"),
    ("Olga", "She", "her"),
    ("Paul", "He", "his"),
    ("Rosa", "She", "her"),
    ("Sam", "He", "his"),
    ("Tina", "She", "her"),
    ("Tom", "He", "his"),
    ("Vera", "She", "her"),
    ("Victor", "He", "his"),
    ("Zoe", "She", "her"),
    ("Otto", "He", "his"),
];
const COLOURS: [&str; 8] = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey"];
const ANIMALS: [&str; 12] =
    ["dog", "cat", "horse", "goat", "rabbit", "duck", "hen", "mouse", "parrot", "pony", "sheep", "turtle"];
const THINGS: [&str; 14] =
    ["kite", "boat", "ball", "hat", "drum", "lamp", "bike", "book", "coat", "basket", "bell", "cup", "flute", "scarf"];
const PLACES: [&str; 12] = [
    "by the river",
    "on the hill",
    "near the forest",
    "at the lake",
    "in the village",
    "behind the mill",
    "next to the school",
    "by the sea",
    "in the valley",
    "near the market",
    "beside the bridge",
    "at the end of the road",
];
const FOODS: [&str; 12] =
    ["plums", "apples", "bread", "cheese", "soup", "honey", "nuts", "pears", "rice", "cake", "berries", "carrots"];

/// Something that is true of one person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// Lives there.
    Home(&'static str),
    /// Has an animal or a thing of this colour: (colour, noun, is an animal).
    Owns(&'static str, &'static str, bool),
    /// Likes to eat it.
    Likes(&'static str),
}

/// A person and what is said about them.
#[derive(Clone, Debug)]
pub struct Person {
    /// The name, one word.
    pub name: &'static str,
    she: &'static str,
    her: &'static str,
    /// Two to four facts.
    pub facts: Vec<Fact>,
}

/// Two or three people. No two share a place, animal, thing or food, so every question has one answer.
#[derive(Clone, Debug)]
pub struct Scene {
    /// In the order in which they appear.
    pub people: Vec<Person>,
}

impl Scene {
    /// Draws one.
    pub fn draw(rng: &mut ChaCha8Rng) -> Self {
        let n = rng.random_range(2..=3);
        let names = pick(&NAMES, n, rng);
        let (places, animals) = (pick(&PLACES, n, rng), pick(&ANIMALS, n, rng));
        let (things, foods) = (pick(&THINGS, n, rng), pick(&FOODS, n, rng));
        let person = |i: usize, rng: &mut ChaCha8Rng| {
            let mut facts = vec![
                Fact::Home(places[i]),
                Fact::Owns(one(&COLOURS, rng), animals[i], true),
                Fact::Owns(one(&COLOURS, rng), things[i], false),
                Fact::Likes(foods[i]),
            ];
            facts.shuffle(rng);
            facts.truncate(if n == 2 { rng.random_range(2..=4) } else { rng.random_range(2..=3) });
            let (name, she, her) = names[i];
            Person { name, she, her, facts }
        };
        Scene { people: (0..n).map(|i| person(i, rng)).collect() }
    }

    /// `Mia, Tom and Anna`
    pub fn everyone(&self) -> String {
        let names: Vec<&str> = self.people.iter().map(|p| p.name).collect();
        let (last, first) = names.split_last().expect("two people at least");
        format!("{} and {last}", first.join(", "))
    }

    /// Each fact once, person by person.
    pub fn introduction(&self, rng: &mut ChaCha8Rng) -> String {
        let mut sentences = vec![];
        for person in &self.people {
            for (i, fact) in person.facts.iter().enumerate() {
                let pronoun = i > 0 && rng.random_bool(0.6);
                sentences.push(introduce(if pronoun { person.she } else { person.name }, *fact, rng));
            }
        }
        if rng.random_bool(0.3) {
            sentences.push(format!("{} are friends.", self.everyone()));
        }
        sentences.join(" ")
    }

    /// What happens afterwards: `n` sentences, each of which repeats a fact.
    pub fn events(&self, n: usize, rng: &mut ChaCha8Rng) -> String {
        let mut all: Vec<(&Person, Fact)> =
            self.people.iter().flat_map(|p| p.facts.iter().map(move |f| (p, *f))).collect();
        all.shuffle(rng);
        let told: Vec<String> =
            all.iter().cycle().take(n).map(|(p, f)| repeat(p, *f, self.other(p, rng), rng)).collect();
        told.join(" ")
    }

    /// A whole story: what a document of the pretraining text is.
    pub fn story(&self, rng: &mut ChaCha8Rng) -> String {
        let n = rng.random_range(5..=9);
        format!("{} {}", self.introduction(rng), self.events(n, rng))
    }

    fn other(&self, person: &Person, rng: &mut ChaCha8Rng) -> &'static str {
        let others: Vec<&'static str> = self.people.iter().map(|p| p.name).filter(|n| *n != person.name).collect();
        one(&others, rng)
    }
}

fn introduce(who: &str, fact: Fact, rng: &mut ChaCha8Rng) -> String {
    let (verbs, object) = match fact {
        Fact::Home(place) => (["lives", "lives", "has a small house", "has a garden"], place.to_owned()),
        Fact::Owns(colour, noun, true) => (["has", "has", "looks after", "owns"], format!("a {colour} {noun}")),
        Fact::Owns(colour, noun, false) => (["has", "has", "has made", "owns"], format!("a {colour} {noun}")),
        Fact::Likes(food) => (["likes", "likes", "likes to eat", "is fond of"], food.to_owned()),
    };
    format!("{who} {} {object}.", one(&verbs, rng))
}

fn repeat(p: &Person, fact: Fact, other: &str, rng: &mut ChaCha8Rng) -> String {
    let (name, her) = (p.name, p.her);
    let sentences = match fact {
        Fact::Home(place) => vec![
            format!("{name} lives {place}."),
            format!("In the evening {name} goes home to the house {place}."),
            format!("{other} visits {name} {place}."),
            format!("The house {place} belongs to {name}."),
        ],
        Fact::Owns(colour, noun, animal) => {
            let mut out = vec![
                format!("{name}'s {noun} is {colour}."),
                format!("The {colour} {noun} belongs to {name}."),
                format!("{name} has a {colour} {noun}."),
                format!("{other} sees the {noun} of {name}, which is {colour}."),
            ];
            out.extend(if animal {
                [
                    format!("{name} goes for a walk with {her} {colour} {noun}."),
                    format!("The {colour} {noun} runs to {name}."),
                ]
            } else {
                [
                    format!("{name} shows {other} {her} {colour} {noun}."),
                    format!("{other} brings the {colour} {noun} back to {name}."),
                ]
            });
            out
        }
        Fact::Likes(food) => vec![
            format!("{name} likes {food}."),
            format!("{other} brings {name} some {food}."),
            format!("For dinner {name} eats {food}."),
            format!("{other} gives the {food} to {name}."),
        ],
    };
    sentences.choose(rng).expect("not empty").clone()
}

/// `n` different ones.
fn pick<T: Copy>(from: &[T], n: usize, rng: &mut ChaCha8Rng) -> Vec<T> {
    from.choose_multiple(rng, n).copied().collect()
}

fn one<T: Copy>(from: &[T], rng: &mut ChaCha8Rng) -> T {
    *from.choose(rng).expect("not empty")
}
