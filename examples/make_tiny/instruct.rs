//! Instructions about a little text: a scene is told, one thing is asked, one sentence answers.
//!
//! Questions are about one person: a model of this size does not learn reliably who of several has what.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::world::{Fact, Scene, a};

/// `n` different rows `{"messages": [user, assistant]}`.
pub fn rows(n: usize, rng: &mut ChaCha8Rng) -> Vec<Value> {
    let mut seen = std::collections::HashSet::new();
    let mut out = Vec::with_capacity(n);
    while out.len() < n {
        let people = if rng.random_bool(0.85) { 1 } else { rng.random_range(2..=3) };
        let scene = Scene::with_people(people, rng);
        let (question, answer) = ask(&scene, rng);
        let text = format!("{}\n{question}", scene.introduction(rng));
        if seen.insert(text.clone()) {
            out.push(json!({"messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ]}));
        }
    }
    out
}

fn ask(scene: &Scene, rng: &mut ChaCha8Rng) -> (String, String) {
    let [person] = &scene.people[..] else {
        return ("Name everyone.".into(), format!("{}.", scene.everyone()));
    };
    let name = person.name;
    let pairs = match *person.facts.choose(rng).expect("three facts at least") {
        Fact::Home(place) => vec![
            (format!("Where does {name} live?"), format!("{name} lives {place}.")),
            (format!("Who lives {place}?"), format!("{name} lives {place}.")),
        ],
        Fact::Keeps(colour, animal) => vec![
            (format!("What colour is {name}'s {animal}?"), format!("{name}'s {animal} is {colour}.")),
            (format!("What animal does {name} have?"), format!("{name} has {} {animal}.", a(colour))),
            (format!("Who has the {colour} {animal}?"), format!("The {colour} {animal} belongs to {name}.")),
        ],
        Fact::Owns(kind, thing) => vec![
            (format!("What kind of {thing} does {name} have?"), format!("{name}'s {thing} is {kind}.")),
            (format!("What thing does {name} have?"), format!("{name} has {} {thing}.", a(kind))),
            (format!("Who has the {kind} {thing}?"), format!("The {kind} {thing} belongs to {name}.")),
        ],
        Fact::Likes(food) => vec![
            (format!("What does {name} like to eat?"), format!("{name} likes {food}.")),
            (format!("Who likes {food}?"), format!("{name} likes {food}.")),
        ],
    };
    pairs.choose(rng).expect("not empty").clone()
}
