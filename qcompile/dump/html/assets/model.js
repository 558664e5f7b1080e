// The data of the report, and what is looked up in it.

/** Deflated JSON in base64, as an object. */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

/** The graph after one pass: its nodes in order, and who is who. */
class Listing {
  constructor(line, nodes) {
    this.name = line.listing;
    this.number = line.listing.split("_")[0];
    this.label = line.listing.slice(this.number.length + 1);
    this.nodes = line.order.map((id) => nodes[id]);
    this.byName = new Map(this.nodes.map((node) => [node.name, node]));
  }

  /** Names of the nodes that read `name`. */
  users(name) {
    if (!this.readers) {
      this.readers = new Map();
      for (const node of this.nodes) {
        for (const input of new Set(node.inputs)) {
          if (!this.readers.has(input)) this.readers.set(input, []);
          this.readers.get(input).push(node.name);
        }
      }
    }
    return this.readers.get(name) ?? [];
  }
}

/** Everything the page shows; passes and listings go by the number that a dump's files begin with. */
class Model {
  constructor(raw) {
    Object.assign(this, raw);
    this.nodes = [];
    this.listings = raw.graphs.map((line) => {
      for (const node of line.new) this.nodes[node.id] = node;
      return new Listing(line, this.nodes);
    });
    this.last = this.listings.at(-1);
    this.coverageOf = new Map(raw.coverage.map((row) => [row.node, row]));
    this.kernelNamed = new Map(raw.kernels.map((kernel) => [kernel.name, kernel]));
    this.kernelsOf = new Map();
    for (const kernel of raw.kernels) {
      for (const name of kernel.nodes) this.kernelsOf.set(name, [...(this.kernelsOf.get(name) ?? []), kernel]);
    }
  }

  /** The listing that stands after pass `number`: its own, or the latest before it. */
  listing(number) {
    const wanted = parseInt(number, 10);
    let found = this.listings[0];
    for (const listing of this.listings) if (parseInt(listing.number, 10) <= wanted) found = listing;
    return Number.isNaN(wanted) ? this.last : found;
  }

  /** The listing before `listing`, itself if it is the first. */
  before(listing) {
    return this.listings[Math.max(0, this.listings.indexOf(listing) - 1)];
  }

  /** The record of pass `number`, undefined for the input. */
  pass(number) {
    return this.passes.find((record) => record.index + 1 === parseInt(number, 10));
  }

  /** A listing that has a node called `name`: the wanted one, else the latest. */
  listingWith(name, number) {
    const wanted = this.listing(number);
    return wanted.byName.has(name) ? wanted : this.listings.findLast((listing) => listing.byName.has(name));
  }

  /** The node that is meant by `name`: its own name, or what a constant is called in the checkpoint. */
  nodeNamed(name) {
    if (this.listings.some((listing) => listing.byName.has(name))) return name;
    this.constants ??= new Map(this.nodes.filter((node) => node.constant).map((node) => [node.constant, node.name]));
    return this.constants.get(name) ?? name;
  }

  /** Through all listings: where a name appears, changes and goes, as [{listing, node, event}]. */
  history(name) {
    const events = [];
    let known;
    for (const listing of this.listings) {
      const node = listing.byName.get(name);
      if (node !== known)
        events.push({ listing, node, event: !known ? "appears" : node ? "changes" : "goes", changed: fieldsThatDiffer(known, node) });
      known = node;
    }
    return events;
  }

  /** Distributions that have to do with a node: of a constant, of the weight that a call multiplies with, of what it reads. */
  distributionsOf(node, listing) {
    const weights = new Set([
      node.name,
      weightName(constantName(node)),
      ...node.inputs.map((name) => weightName(listing.byName.get(name)?.constant)),
    ]);
    const kinds = node.op === "constant" ? ["weights"] : ["activations", "weights"];
    return kinds.flatMap((kind) =>
      (this.distributions[kind] ?? []).filter((item) => weights.has(item.name)).map((item) => ({ kind, item })),
    );
  }
}

const FIELDS = ["call", "type", "format", "log", "passes", "origins", "source"];

/** Which facts about a node are not the same. */
function fieldsThatDiffer(before, after) {
  if (!before || !after) return [];
  return FIELDS.filter((field) => String(before[field] ?? "") !== String(after[field] ?? ""));
}

/** What a constant is called in the checkpoint; undefined for anything else. */
const constantName = (node) => node.constant ?? undefined;

/** The weight that a constant is a part of: `q_proj.weight` of `q_proj.weight.codes`. */
const weightName = (name) => name?.replace(/\.(codes|scale|scale2|zero)$/, "");

/** `98.3 MB`, as the tables of the terminal have it. */
function bytesText(count) {
  let size = count,
    unit = "B";
  for (const larger of ["kB", "MB", "GB", "TB"]) {
    if (size < 999.5) break;
    [size, unit] = [size / 1000, larger];
  }
  return unit === "B" ? `${size} B` : `${Number(size.toPrecision(3))} ${unit}`;
}

/** Three significant digits, without an exponent where there is no need of one. */
function numberText(value) {
  if (value === null || value === undefined) return "";
  if (value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3)) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

/** Numbers as ranges: `0–3, 5, 7–9`; a long row of lone ones is cut short. */
function rangesText(numbers) {
  const runs = [];
  for (const number of numbers) {
    const run = runs.at(-1);
    if (run && run[1] === number - 1) run[1] = number;
    else runs.push([number, number]);
  }
  const shown = runs.map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`));
  return shown.length > 8 ? `${shown.slice(0, 4).join(", ")} … ${shown.at(-1)}` : shown.join(", ");
}
