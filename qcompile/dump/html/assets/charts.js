// Drawings as SVG: histograms, channel maxima, a heat map. Colours come from the style sheet but for the heat map's scale.

const CHART = { width: 300, height: 84 };

/** A histogram's outline over a common range, heights as logarithms of counts so that lone outliers are seen. */
function outline({ low, high, counts }, range, closed) {
  const most = Math.log1p(Math.max(...counts)),
    step = (high - low) / counts.length || 1;
  const x = (value) => ((value - range.low) / (range.high - range.low || 1)) * CHART.width;
  const y = (count) => CHART.height - (most ? Math.log1p(count) / most : 0) * (CHART.height - 4);
  const points = counts.flatMap((count, index) => [
    [x(low + index * step), y(count)],
    [x(low + (index + 1) * step), y(count)],
  ]);
  const path = points.map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`).join(" L");
  return closed ? `M${x(low).toFixed(1)},${CHART.height} L${path} L${x(high).toFixed(1)},${CHART.height} Z` : `M${path}`;
}

/** Two histograms over each other: before as an area, after as a line. */
function histogramChart(before, after, name) {
  const both = [before, after].filter(Boolean).map((stage) => stage.histogram);
  const range = { low: Math.min(...both.map((item) => item.low)), high: Math.max(...both.map((item) => item.high)) };
  const zero = range.low < 0 && range.high > 0 ? (-range.low / (range.high - range.low)) * CHART.width : undefined;
  return h(
    "figure",
    {},
    s(
      "svg",
      {
        viewBox: `0 0 ${CHART.width} ${CHART.height}`,
        role: "img",
        "aria-label": `${name}: values from ${numberText(range.low)} to ${numberText(range.high)}`,
        preserveAspectRatio: "none",
        class: "chart",
      },
      zero !== undefined && s("line", { class: "zero", x1: zero, x2: zero, y1: 0, y2: CHART.height }),
      before && s("path", { class: "area", d: outline(before.histogram, range, true) }),
      after && s("path", { class: "line", d: outline(after.histogram, range, false), "vector-effect": "non-scaling-stroke" }),
    ),
    h("figcaption", {}, h("span", {}, numberText(range.low)), h("span", {}, "values, log of count"), h("span", {}, numberText(range.high))),
  );
}

/** The largest magnitude of each run of channels, before behind after. */
function channelChart(before, after, name) {
  if (!before.channel_max.length) return undefined;
  const most = Math.max(...[before, after].filter(Boolean).flatMap((stage) => stage.channel_max.map((value) => value ?? 0))) || 1;
  const bars = (stage, kind) =>
    stage?.channel_max.map((value, index) => {
      const width = CHART.width / stage.channel_max.length,
        height = ((value ?? 0) / most) * (CHART.height - 2);
      return s("rect", {
        class: kind,
        x: (index * width).toFixed(2),
        y: (CHART.height - height).toFixed(2),
        width: (width * 0.8).toFixed(2),
        height: height.toFixed(2),
      });
    });
  return h(
    "figure",
    {},
    s(
      "svg",
      {
        viewBox: `0 0 ${CHART.width} ${CHART.height}`,
        role: "img",
        "aria-label": `${name}: largest magnitude of each channel, up to ${numberText(most)}`,
        preserveAspectRatio: "none",
        class: "chart",
      },
      bars(before, "area"),
      bars(after, "front"),
    ),
    h("figcaption", {}, h("span", {}, "first channel"), h("span", {}, `largest magnitude, to ${numberText(most)}`), h("span", {}, "last")),
  );
}

/** Stages of one distribution as a table: which pass, how far the largest stands out, kurtosis. */
function stageTable(stages) {
  return table(
    ["after", "max / rms", "kurtosis"],
    stages.map((stage) => {
      const number = stage.listing.split("_")[0];
      return [
        h("a", { href: number === "000" ? "#graph/000" : passHref(number) }, stage.listing.replace("_", " ")),
        numberText(stage.max_over_rms),
        numberText(stage.kurtosis),
      ];
    }),
    [1, 2],
    "stages",
  );
}

/** Cividis (Nuñez, Anderton, Renslow 2018): the same to eyes with and without a colour deficiency, even in lightness. */
const CIVIDIS = [
  [0, 32, 76],
  [0, 48, 111],
  [57, 72, 107],
  [87, 93, 109],
  [112, 113, 115],
  [138, 134, 121],
  [165, 156, 116],
  [195, 179, 105],
  [225, 204, 85],
  [255, 234, 70],
];

/** A colour of the scale for a share between 0 and 1. */
function heat(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1),
    low = Math.floor(at),
    high = Math.min(low + 1, CIVIDIS.length - 1);
  const mixed = CIVIDIS[low].map((value, index) => Math.round(value + (CIVIDIS[high][index] - value) * (at - low)));
  return `rgb(${mixed.join(",")})`;
}

/** A grid of cells {row, column, value, title}; `onchoose` is told the cell. */
function heatMap(rows, columns, cells, onchoose) {
  const [left, top, height] = [150, 18, 26],
    width = Math.min(48, Math.max(14, Math.floor(780 / columns.length)));
  const most = Math.max(...cells.map((cell) => cell.value), 0) || 1;
  const size = { width: left + columns.length * width, height: top + rows.length * height };
  const every = Math.ceil(24 / width);
  return s(
    "svg",
    {
      class: "heat",
      viewBox: `0 0 ${size.width} ${size.height}`,
      width: size.width,
      height: size.height,
      role: "group",
      "aria-label": "KL divergence by layer and kind",
    },
    columns.map(
      (name, index) => index % every === 0 && s("text", { x: left + (index + 0.5) * width, y: 12, "text-anchor": "middle" }, name),
    ),
    rows.map((name, index) => s("text", { x: left - 8, y: top + (index + 0.65) * height, "text-anchor": "end" }, name)),
    cells.map((cell) =>
      s(
        "rect",
        {
          x: left + columns.indexOf(cell.column) * width + 0.5,
          y: top + rows.indexOf(cell.row) * height + 0.5,
          width: width - 1,
          height: height - 1,
          fill: heat(Math.max(cell.value, 0) / most),
          tabindex: "-1",
          role: "button",
          "aria-label": cell.title,
          "data-cell": "",
          onclick: () => onchoose(cell),
          onkeydown: (event) => event.key === "Enter" && onchoose(cell),
        },
        s("title", {}, cell.title),
      ),
    ),
  );
}

/** The scale of the heat map with its ends. */
function heatLegend(most) {
  const stops = Array.from({ length: 24 }, (_, index) => s("rect", { x: index * 6, y: 0, width: 6.5, height: 10, fill: heat(index / 23) }));
  return h("span", { class: "legend" }, "0", s("svg", { width: 144, height: 10, "aria-hidden": "true" }, stops), numberText(most));
}
