//! Less text for the same picture: notebooks keep every chart that was ever shown.

/// The same SVG as plotters wrote it, shorter: polygons as paths, without line breaks and what the style sheet says.
pub(super) fn compact(svg: &str) -> String {
    let svg = svg
        .replace(">\n", ">")
        .replace("\n<", "<")
        .replace(" font-family=\"sans-serif\"", "")
        .replace(" opacity=\"1\"", "");
    let mut out = String::with_capacity(svg.len());
    let mut rest = svg.as_str();
    while let Some(at) = rest.find("<polygon") {
        let (before, tail) = rest.split_at(at);
        let Some(end) = tail.find("/>") else { break };
        let (polygon, after) = tail.split_at(end);
        out.push_str(before);
        match polygon.split_once("points=\"").and_then(|(head, points)| Some((head, path(points.strip_suffix('"')?)?)))
        {
            Some((head, path)) => {
                out.push_str(&head.replacen("<polygon", "<path", 1));
                out.push_str(&format!("d=\"{path}\""));
            }
            None => out.push_str(polygon),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// `0,4 9,4 9,6 ` as `M0 4H9V6z`.
fn path(points: &str) -> Option<String> {
    let mut points = points.split_whitespace().map(|p| p.split_once(','));
    let (mut x, mut y) = points.next()??;
    let mut out = format!("M{x} {y}");
    for point in points {
        let (to_x, to_y) = point?;
        match (to_x == x, to_y == y) {
            (true, true) => {}
            (true, false) => out.push_str(&format!("V{to_y}")),
            (false, true) => out.push_str(&format!("H{to_x}")),
            (false, false) => out.push_str(&format!("L{to_x} {to_y}")),
        }
        (x, y) = (to_x, to_y);
    }
    out.push('z');
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::compact;

    #[test]
    fn polygons_become_paths_and_the_rest_stays() {
        let svg = "<svg>\n<text x=\"1\" font-family=\"sans-serif\">\n5 GB\n</text>\n\
                   <polygon opacity=\"1\" fill=\"red\" points=\"0,4 9,4 9,6 2,7 \"/>\n<circle r=\"2\"/>\n</svg>\n";
        let short = "<svg><text x=\"1\">5 GB</text><path fill=\"red\" d=\"M0 4H9V6L2 7z\"/><circle r=\"2\"/></svg>";
        assert_eq!(compact(svg), short);
        assert_eq!(compact("<polygon points=\"a b\"/>"), "<polygon points=\"a b\"/>");
    }
}
