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
const KINDS: [&str; 8] = ["small", "big", "old", "new", "wooden", "pretty", "heavy", "shiny"];
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
    /// Has an animal of this colour: (colour, animal).
    Keeps(&'static str, &'static str),
    /// Has a thing of this kind: (kind, thing).
    Owns(&'static str, &'static str),
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

/// One, two or three people. No two share a place, animal, thing or food.
#[derive(Clone, Debug)]
pub struct Scene {
    /// In the order in which they appear.
    pub people: Vec<Person>,
}

impl Scene {
    /// Draws one with one to three people.
    pub fn draw(rng: &mut ChaCha8Rng) -> Self {
        let people = one(&[1, 1, 2, 2, 3], rng);
        Self::with_people(people, rng)
    }

    /// Draws one with `n` people; one person alone has more facts.
    pub fn with_people(n: usize, rng: &mut ChaCha8Rng) -> Self {
        let names = pick(&NAMES, n, rng);
        let (places, animals) = (pick(&PLACES, n, rng), pick(&ANIMALS, n, rng));
        let (things, foods) = (pick(&THINGS, n, rng), pick(&FOODS, n, rng));
        let person = |i: usize, rng: &mut ChaCha8Rng| {
            let mut facts = vec![
                Fact::Home(places[i]),
                Fact::Keeps(one(&COLOURS, rng), animals[i]),
                Fact::Owns(one(&KINDS, rng), things[i]),
                Fact::Likes(foods[i]),
            ];
            facts.shuffle(rng);
            facts.truncate(if n == 1 { rng.random_range(3..=4) } else { rng.random_range(2..=3) });
            let (name, she, her) = names[i];
            Person { name, she, her, facts }
        };
        Scene { people: (0..n).map(|i| person(i, rng)).collect() }
    }

    /// `Mia, Tom and Anna`
    pub fn everyone(&self) -> String {
        let names: Vec<&str> = self.people.iter().map(|p| p.name).collect();
        match names.split_last() {
            Some((last, first)) if !first.is_empty() => format!("{} and {last}", first.join(", ")),
            _ => names.concat(),
        }
    }

    /// Each fact once, person by person.
    pub fn introduction(&self, rng: &mut ChaCha8Rng) -> String {
        let mut sentences = vec![];
        for person in &self.people {
            for (i, fact) in person.facts.iter().enumerate() {
                let pronoun = i > 0 && rng.random_bool(0.3);
                sentences.push(introduce(if pronoun { person.she } else { person.name }, *fact, rng));
            }
        }
        if self.people.len() > 1 && rng.random_bool(0.3) {
            sentences.push(format!("{} are friends.", self.everyone()));
        }
        sentences.join(" ")
    }

    /// What happens afterwards: up to `n` sentences, each of which repeats a fact, none twice.
    pub fn events(&self, n: usize, rng: &mut ChaCha8Rng) -> String {
        let mut facts: Vec<(&Person, Fact)> =
            self.people.iter().flat_map(|p| p.facts.iter().map(move |fact| (p, *fact))).collect();
        facts.shuffle(rng);
        let mut told: Vec<String> = vec![];
        for (person, fact) in facts.iter().cycle().take(n) {
            let sentence = self.repeat(person, *fact, rng);
            if !told.contains(&sentence) {
                told.push(sentence);
            }
        }
        told.join(" ")
    }

    /// A whole story: what a document of the pretraining text is.
    pub fn story(&self, rng: &mut ChaCha8Rng) -> String {
        let n = rng.random_range(6..=10);
        format!("{} {}", self.introduction(rng), self.events(n, rng))
    }

    fn repeat(&self, p: &Person, fact: Fact, rng: &mut ChaCha8Rng) -> String {
        let (name, her) = (p.name, p.her);
        let others: Vec<&str> = self.people.iter().map(|q| q.name).filter(|other| *other != name).collect();
        let alone = match fact {
            Fact::Home(place) => vec![
                format!("{name} lives {place}."),
                format!("In the evening {name} goes home to the house {place}."),
                format!("The house {place} belongs to {name}."),
            ],
            Fact::Keeps(colour, animal) => vec![
                format!("{name} has {} {animal}.", a(colour)),
                format!("{name}'s {animal} is {colour}."),
                format!("The {colour} {animal} belongs to {name}."),
                format!("The {colour} {animal} runs to {name}."),
                format!("{name} goes for a walk with {her} {colour} {animal}."),
            ],
            Fact::Owns(kind, thing) => vec![
                format!("{name} has {} {thing}.", a(kind)),
                format!("{name}'s {thing} is {kind}."),
                format!("The {kind} {thing} belongs to {name}."),
                format!("{name} looks for {her} {kind} {thing}."),
            ],
            Fact::Likes(food) => vec![
                format!("{name} likes {food}."),
                format!("{name} buys some {food}."),
                format!("For dinner {name} eats {food}."),
            ],
        };
        let together = others.choose(rng).map_or(vec![], |other| match fact {
            Fact::Home(place) => vec![format!("{other} visits {name} {place}.")],
            Fact::Keeps(colour, animal) => vec![format!("{other} sees the {animal} of {name}, which is {colour}.")],
            Fact::Owns(kind, thing) => vec![
                format!("{name} shows {other} {her} {kind} {thing}."),
                format!("{other} brings the {kind} {thing} back to {name}."),
            ],
            Fact::Likes(food) => {
                vec![format!("{other} brings {name} some {food}."), format!("{other} gives the {food} to {name}.")]
            }
        });
        let sentences = [alone, together].concat();
        sentences.choose(rng).expect("not empty").clone()
    }
}

fn introduce(who: &str, fact: Fact, rng: &mut ChaCha8Rng) -> String {
    let (verbs, object) = match fact {
        Fact::Home(place) => (["lives", "lives", "has a small house", "has a garden"], place.to_owned()),
        Fact::Keeps(colour, animal) => (["has", "has", "looks after", "owns"], format!("{} {animal}", a(colour))),
        Fact::Owns(kind, thing) => (["has", "has", "has made", "owns"], format!("{} {thing}", a(kind))),
        Fact::Likes(food) => (["likes", "likes", "likes to eat", "is fond of"], food.to_owned()),
    };
    format!("{who} {} {object}.", one(&verbs, rng))
}

/// `a red`, `an old`
pub fn a(word: &str) -> String {
    let article = if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {word}")
}

/// `n` different ones.
fn pick<T: Copy>(from: &[T], n: usize, rng: &mut ChaCha8Rng) -> Vec<T> {
    from.choose_multiple(rng, n).copied().collect()
}

fn one<T: Copy>(from: &[T], rng: &mut ChaCha8Rng) -> T {
    *from.choose(rng).expect("not empty")
}
