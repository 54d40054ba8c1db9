// Without this script the page is whole: it makes hover text prompt, lets the keyboard walk the pictures, reads heat maps
// back, opens them for print, and adds copy buttons.
(() => {
  const add = (name) => {
    const made = document.createElement("div");
    made.className = name;
    document.body.append(made);
    return made;
  };
  const tip = add("tip"), spoken = add("spoken");
  tip.setAttribute("aria-hidden", "true");
  spoken.setAttribute("aria-live", "polite");
  const show = (words, x, y) => {
    tip.textContent = words;
    tip.classList.add("on");
    const room = document.documentElement.clientWidth, box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, room - box.width - 8)) + "px";
    tip.style.top = (y + 16 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 16) + "px";
  };
  const hide = () => tip.classList.remove("on");
  const say = (words, box) => {
    show(words, box.left + box.width / 2, box.top + Math.min(box.height / 2, innerHeight / 3));
    spoken.textContent = words;
  };

  // A ladder's column: its words stand in <title>, which browsers would show late; they move to a data attribute.
  const columnWords = (column) => {
    const title = column.querySelector("title");
    if (title) { column.dataset.tip = title.textContent; title.remove(); }
    return column.dataset.tip;
  };

  // A heat map's cell, read back from its pixel.
  const pixels = new WeakMap();
  const palette = JSON.parse(document.getElementById("palette")?.textContent ?? '""');
  const levels = new Map();
  for (let at = 0; at < 250; at++) levels.set(palette.slice(at * 6, at * 6 + 6), at);
  const load = (svg) => {
    if (pixels.has(svg)) return;
    pixels.set(svg, null);
    const picture = new Image();
    picture.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = picture.width; canvas.height = picture.height;
      const context = canvas.getContext("2d");
      context.drawImage(picture, 0, 0);
      pixels.set(svg, context.getImageData(0, 0, picture.width, picture.height));
    };
    picture.src = svg.querySelector(".cells").getAttribute("href");
  };
  const cell = (svg, x, y) => {
    const data = pixels.get(svg);
    if (!data || x < 0 || y < 0 || x >= 1 || y >= 1) return null;
    const column = Math.floor(x * data.width), row = Math.floor(y * data.height), at = 4 * (row * data.width + column);
    const seams = JSON.parse(svg.dataset.seams), token = Math.floor(x * svg.dataset.tokens);
    const code = [0, 1, 2].map((part) => data.data[at + part].toString(16).padStart(2, "0")).join("");
    const low = +svg.dataset.low, high = +svg.dataset.high, level = levels.get(code);
    const value = data.data[at + 3] === 0 ? "not measured" : level === undefined ? "∞"
      : (level === 0 ? "at most " : "≈ ") + (10 ** (low + (high - low) * level / 249)).toExponential(1);
    return `${seams[row]}\n${svg.dataset.unit} ${token}: ${value}`;
  };
  const inside = (svg, event) => {
    const box = svg.querySelector(".cells").getBoundingClientRect();
    return cell(svg, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  };

  document.addEventListener("pointermove", (event) => {
    const column = event.target.closest?.("g.col");
    if (column) return show(columnWords(column), event.clientX, event.clientY);
    const map = event.target.closest?.("svg.heat");
    if (map) {
      load(map);
      const words = inside(map, event);
      if (words) return show(words, event.clientX, event.clientY);
    }
    hide();
  });
  document.addEventListener("scroll", hide, { passive: true });

  // Keyboard: a chart takes the focus, arrows walk its columns or cells, Home and End jump, Escape leaves.
  const places = new WeakMap();
  const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1],
                  Home: [-1e9, 0], End: [1e9, 0] };
  const walk = (chart, [dx, dy]) => {
    const columns = [...chart.querySelectorAll("g.col")], map = chart.querySelector("svg.heat");
    const [x, y] = places.get(chart) ?? [-1, 0];
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    if (columns.length) {
      const at = within(x + dx, columns.length);
      places.set(chart, [at, 0]);
      columns.forEach((column, number) => column.classList.toggle("on", number === at));
      say(columnWords(columns[at]), columns[at].getBoundingClientRect());
    } else if (map && pixels.get(map)) {
      const count = +map.dataset.tokens, rows = JSON.parse(map.dataset.seams).length;
      const at = [within(x + dx, count), within(y + dy, rows)], aim = map.querySelector(".aim");
      places.set(chart, at);
      const cells = map.querySelector(".cells"), wide = +cells.getAttribute("width") / count;
      const tall = +cells.getAttribute("height") / rows;
      aim.setAttribute("x", +cells.getAttribute("x") + at[0] * wide); aim.setAttribute("width", Math.max(3, wide));
      aim.setAttribute("y", +cells.getAttribute("y") + at[1] * tall); aim.setAttribute("height", tall);
      say(cell(map, (at[0] + 0.5) / count, (at[1] + 0.5) / rows), aim.getBoundingClientRect());
    }
  };
  document.addEventListener("focusin", (event) => {
    const map = event.target.querySelector?.("svg.heat");
    if (event.target.matches?.(".chart") && map) load(map);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    if (!event.target.matches?.(".chart") || !(event.key in steps)) return;
    event.preventDefault();
    walk(event.target, steps[event.key]);
  });
  document.addEventListener("focusout", (event) => {
    if (!event.target.matches?.(".chart")) return;
    hide();
    for (const column of event.target.querySelectorAll("g.col.on")) column.classList.remove("on");
  });

  // Paper has no summary to click on: heat maps are opened for it, the long tables stay in the file.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.map:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });

  // Where a picture is wider than the screen, begin at the seam that broke.
  for (const pole of document.querySelectorAll(".chart .broken")) {
    const chart = pole.closest(".chart");
    chart.scrollLeft += pole.getBoundingClientRect().left - chart.getBoundingClientRect().left - chart.clientWidth / 2;
  }

  for (const block of document.querySelectorAll("pre.copy")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "copy";
    button.addEventListener("click", async () => {
      const words = block.querySelector("code").textContent;
      try {
        await navigator.clipboard.writeText(words);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(block.querySelector("code"));
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
    block.append(button);
  }
})();
