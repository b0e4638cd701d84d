//! Instructions about a little text: a scene is told, one thing is asked, one sentence answers.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::world::{Fact, Scene};

/// `n` different rows `{"messages": [user, assistant]}`.
pub fn rows(n: usize, rng: &mut ChaCha8Rng) -> Vec<Value> {
    let mut seen = std::collections::HashSet::new();
    let mut out = Vec::with_capacity(n);
    while out.len() < n {
        let scene = Scene::draw(rng);
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
    if rng.random_bool(0.1) {
        return ("Name everyone.".into(), format!("{}.", scene.everyone()));
    }
    let person = scene.people.choose(rng).expect("two people at least");
    let fact = *person.facts.choose(rng).expect("two facts at least");
    let name = person.name;
    let mut pairs = match fact {
        Fact::Home(place) => vec![
            (format!("Where does {name} live?"), format!("{name} lives {place}.")),
            (format!("Who lives {place}?"), format!("{name} lives {place}.")),
        ],
        Fact::Owns(colour, noun, _) => vec![
            (format!("What colour is {name}'s {noun}?"), format!("{name}'s {noun} is {colour}.")),
            (format!("Who has the {colour} {noun}?"), format!("The {colour} {noun} belongs to {name}.")),
        ],
        Fact::Likes(food) => vec![
            (format!("What does {name} like to eat?"), format!("{name} likes {food}.")),
            (format!("Who likes {food}?"), format!("{name} likes {food}.")),
        ],
    };
    pairs.shuffle(rng);
    pairs.swap_remove(0)
}
