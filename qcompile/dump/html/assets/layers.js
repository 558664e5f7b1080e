// A listing in sections, one per layer of the model, and layers that are alike as one.

/** What makes two nodes of two layers the same: everything but names and numbers. */
function kindOf(node) {
  return [node.op, node.op === "constant" ? node.folded : node.operator, node.type, node.inputs.length].join(" ");
}

/** The sections of a listing: inputs and shared constants, what comes before the layers, each layer, what comes after. */
function sectionsOf(listing) {
  const calls = listing.nodes.map((node, index) => (node.op === "call" && node.layer !== null ? index : -1)).filter((index) => index >= 0);
  const first = calls[0] ?? Infinity, last = calls.at(-1) ?? -1;
  const found = new Map();
  listing.nodes.forEach((node, index) => {
    const key = sectionKey(node, index, first, last);
    if (!found.has(key)) found.set(key, { key, layer: node.layer, nodes: [] });
    found.get(key).nodes.push(node);
  });
  return [...found.values()].sort((a, b) => sectionRank(a.key) - sectionRank(b.key));
}

function sectionKey(node, index, first, last) {
  if (node.layer !== null) return `layer ${node.layer}`;
  if (node.op === "input") return "inputs";
  if (node.op === "constant") return "shared constants";
  if (first === Infinity) return "operators";
  if (index < first) return "before the layers";
  return index > last ? "after the layers" : "beside the layers";
}

function sectionRank(key) {
  const order = ["inputs", "shared constants", "before the layers", "operators", "beside the layers"];
  const rank = order.indexOf(key);
  if (rank >= 0) return rank - order.length;
  return key === "after the layers" ? Infinity : Number(key.split(" ")[1]);
}

/** Sections whose `signature` is the same as one group, in order of the first; anything but a layer stays alone. */
function foldAlike(sections, signature) {
  const groups = new Map();
  for (const section of sections) {
    const layered = section.key.startsWith("layer ");
    const key = layered ? `layer|${signature(section)}` : section.key;
    if (!groups.has(key)) groups.set(key, { sections: [], layered });
    groups.get(key).sections.push(section);
  }
  return [...groups.values()].map((group) => ({ ...group, title: groupTitle(group) }));
}

function groupTitle({ sections, layered }) {
  if (!layered) return sections[0].key;
  const numbers = sections.map((section) => section.layer);
  return numbers.length === 1 ? `layer ${numbers[0]}` : `layers ${rangesText(numbers)}`;
}

const alikeNodes = (section) => section.nodes.map(kindOf).join("\n");

/** In a group of alike layers: position -> [{field, values: Map(value -> layers)}] where not all layers say the same. */
function differencesIn(group) {
  const found = new Map();
  if (group.sections.length < 2) return found;
  group.sections[0].nodes.forEach((_, position) => {
    const fields = ["format", "log", "passes"].map((field) => ({ field, values: valuesAt(group, position, field) }));
    const differing = fields.filter(({ values }) => values.size > 1);
    if (differing.length) found.set(position, differing);
  });
  return found;
}

function valuesAt(group, position, field) {
  const values = new Map();
  for (const section of group.sections) {
    const text = [section.nodes[position][field] ?? "none"].flat().join(" › ") || "none";
    if (!values.has(text)) values.set(text, []);
    values.get(text).push(section.layer);
  }
  return values;
}
