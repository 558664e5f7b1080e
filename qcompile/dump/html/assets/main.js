// Addresses, keys, colours: the address after # says everything that is shown.

const VIEWS = ["pipeline", "graph", "diff", "distributions", "sensitivity", "coverage", "kernels", "memory"];
const THEMES = ["auto", "light", "dark"];
let page;

/** Go to an address; the same one again is shown again. */
function go(hash) {
  if (location.hash === hash) page?.route();
  else location.hash = hash;
}

class Page {
  constructor(model) {
    this.model = model;
    this.graph = new GraphView(model, byId("view-graph"));
    this.diff = new DiffView(model, byId("view-diff"));
    this.distributions = new DistributionsView(model, byId("view-distributions"));
    this.sensitivity = new SensitivityView(model, byId("view-sensitivity"));
    this.search = new Search(model, byId("search"), byId("results"));
    this.inspector = byId("inspector");
    roving(byId("view-pipeline"), "a.row-link");
    roving(byId("view-kernels"), "a.row-link");
    byId("view-pipeline")
      .querySelectorAll("tbody tr")
      .forEach((row) => row.addEventListener("click", () => go(passHref(row.dataset.number))));
    drawFormats(model, byId("weights-by-format"));
    window.addEventListener("hashchange", () => this.route());
    document.addEventListener("keydown", (event) => this.key(event));
  }

  /** Show what the address says. */
  route() {
    const { view, argument, node, pass, kernel } = parse(location.hash, this.model);
    this.view = view;
    for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
    document
      .querySelectorAll("nav a")
      .forEach((link) => (link.dataset.view === view ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current")));
    // The panel first: what it takes of the width is known when the view scrolls to its place.
    this.inspect(node, pass, kernel);
    this.draw(view, argument, node, pass, kernel);
    document.title = [argument || node?.name || pass || kernel || view, this.model.title, "qcompile"].join(" · ");
  }

  draw(view, argument, node, pass, kernel) {
    if (view === "graph") this.graph.show(argument || (node?.number ?? ""), node?.name);
    if (view === "diff") this.diff.show(...argument.split(".."), node?.name);
    if (view === "distributions") this.distributions.show(...argument.split("/"));
    if (view === "sensitivity") this.sensitivity.show();
    if (view === "kernels") drawKernels(this.model, byId("view-kernels"), kernel);
    if (view === "pipeline") markPass(pass);
  }

  inspect(node, pass, kernel) {
    const content = node
      ? nodeDetails(this.model, node.name, node.number)
      : kernel
        ? kernelDetails(this.model, kernel)
        : pass
          ? passDetails(this.model, pass)
          : undefined;
    this.inspector.hidden = !content;
    this.inspector.classList.toggle("wide", Boolean(kernel));
    this.inspector.replaceChildren(...(content ?? []).flat(Infinity).filter(Boolean));
    this.inspector.scrollTop = 0;
  }

  key(event) {
    // On some keyboards brackets are typed with AltGr, which browsers report as Ctrl and Alt.
    if ((event.ctrlKey || event.metaKey || event.altKey) && !event.getModifierState("AltGraph")) return;
    if (event.key === "Escape") return this.escape();
    if (event.target.matches("input[type=text], select, textarea")) return;
    const action = this.actions()[event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  }

  actions() {
    const views = Object.fromEntries(VIEWS.map((view, index) => [String(index + 1), () => go(`#${view}`)]));
    return {
      ...views,
      "/": () => byId("search").select(),
      "?": () => byId("keys").showModal(),
      t: nextTheme,
      "[": () => this.step(-1),
      "]": () => this.step(1),
    };
  }

  escape() {
    if (!this.inspector.hidden && !byId("keys").open) closeInspector();
  }

  /** The pass before or after: of a diff, of a graph, of the timeline. */
  step(by) {
    if (this.view === "diff") return this.diff.move(by);
    const model = this.model;
    if (this.view === "graph") {
      const to = model.listings[model.listings.indexOf(this.graph.listing) + by];
      return to && go(`#graph/${to.number}`);
    }
    const now = parseInt(parse(location.hash, model).pass ?? "-1", 10);
    const to = Math.min(Math.max(now + by, 0), model.passes.length);
    return go(passHref(String(to).padStart(3, "0")));
  }
}

/** An address as {view, argument, node, pass, kernel}; what makes no sense is the pipeline. */
function parse(hash, model) {
  const [path, query] = hash.replace(/^#/, "").split("?");
  const [head, ...rest] = path.split("/");
  const argument = rest.map(decode).join("/");
  const node = new URLSearchParams(query ?? "").get("node");
  const chosen = node ? nodeAddress(node) : undefined;
  if (head === "node") return { view: "graph", argument: "", node: resolved(nodeAddress(argument), model) };
  if (head === "pass") return { view: "pipeline", argument: "", pass: argument.split("_")[0].padStart(3, "0") };
  if (head === "kernel") return { view: "kernels", argument: "", kernel: argument };
  return { view: VIEWS.includes(head) ? head : "pipeline", argument, node: chosen };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** `NAME@NUMBER`, the number left out or the whole name of a listing. */
function nodeAddress(text) {
  const at = text.lastIndexOf("@");
  return at < 0 ? { name: text, number: "" } : { name: text.slice(0, at), number: text.slice(at + 1).split("_")[0] };
}

/** The address with a listing in which the node is; constants may be asked for by what the checkpoint calls them. */
function resolved(address, model) {
  const name = model.nodeNamed(address.name);
  return { name, number: model.listingWith(name, address.number)?.number ?? address.number };
}

function markPass(number) {
  byId("view-pipeline")
    .querySelectorAll("tbody tr")
    .forEach((row) => {
      const chosen = row.dataset.number === number;
      if (chosen) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
      const link = row.querySelector("a.row-link");
      link.setAttribute("tabindex", chosen || (!number && row.dataset.number === "000") ? "0" : "-1");
      if (chosen) row.scrollIntoView({ block: "nearest" });
      if (chosen && link.closest("tbody").contains(document.activeElement)) link.focus();
    });
}

/** Close the panel: the address without what it showed. */
function closeInspector() {
  const { view, argument, node } = parse(location.hash, page.model);
  go(view === "graph" && node ? `#graph/${node.number}` : `#${[view, argument].filter(Boolean).join("/")}`);
}

/** How many bytes of the constants are in which format, as one bar. */
function drawFormats(model, root) {
  const constants = new Map((model.last?.nodes ?? []).filter((node) => node.op === "constant").map((node) => [constantName(node), node]));
  const sizes = new Map();
  for (const node of constants.values()) {
    const form = node.format || node.type.split("[")[0];
    sizes.set(form, (sizes.get(form) ?? 0) + (node.bytes ?? 0));
  }
  const total = [...sizes.values()].reduce((a, b) => a + b, 0);
  if (!total) return;
  const order = [...sizes].sort((a, b) => b[1] - a[1]);
  let x = 0;
  const bars = order.map(([form, bytes], index) => {
    const width = (bytes / total) * 1000,
      bar = s(
        "rect",
        { class: `format-${Math.min(index, 5)}`, x, y: 0, width: Math.max(width - 2, 1), height: 18 },
        s("title", {}, `${form}: ${bytesText(bytes)}`),
      );
    x += width;
    return bar;
  });
  root.replaceChildren(
    h("h2", {}, "Constants by format"),
    s(
      "svg",
      { class: "formats", viewBox: "0 0 1000 18", preserveAspectRatio: "none", role: "img", "aria-label": "bytes of constants by format" },
      bars,
    ),
    h(
      "p",
      { class: "keyed" },
      order.map(([form, bytes], index) =>
        h(
          "span",
          {},
          h("i", { class: `swatch format-${Math.min(index, 5)}` }),
          `${form} `,
          h("b", {}, bytesText(bytes)),
          ` ${((100 * bytes) / total).toFixed(1)} %`,
        ),
      ),
    ),
  );
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme;
  byId("theme").setAttribute("aria-label", `Colours: ${theme}`);
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  setTheme(theme);
  try {
    localStorage.setItem("qcompile-theme", theme);
  } catch {
    /* a browser that keeps nothing for files */
  }
}

function storedTheme() {
  try {
    return localStorage.getItem("qcompile-theme");
  } catch {
    return null;
  }
}

async function start() {
  setTheme(THEMES.includes(storedTheme()) ? storedTheme() : "auto");
  byId("theme").addEventListener("click", nextTheme);
  byId("help").addEventListener("click", () => byId("keys").showModal());
  // Before the data is there: without a script all tables are shown.
  for (const name of VIEWS) byId(`view-${name}`).hidden = name !== "pipeline";
  page = new Page(new Model(await unpack(byId("data").textContent)));
  page.route();
  document.documentElement.dataset.ready = "true";
}

start();
