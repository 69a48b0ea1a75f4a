// Draws what charts.py took from the figures, in the colours of the reader's light or dark setting.
(function () {
  var boxes = document.querySelectorAll(".chart"), mouse = matchMedia("(pointer: fine)").matches;
  var digits = "{" + "%.4g}";  // in two parts, because Jinja reads this file, too
  var texts = Array.from(boxes, function (box) { return box.firstElementChild.textContent; });

  function axis(mine, settings, soft, width) {
    mine.axis_label = (settings.label.length * 6.5 > width ? settings.label.split(" (")[0] : settings.label) || null;
    mine.axis_label_text_font_style = "normal";
    mine.axis_label_text_font_size = "12px";
    mine.major_label_text_font_size = settings.names ? "11px" : "0px";
    mine.axis_label_text_color = soft;
    mine.major_label_text_color = settings.names ? soft : null;
    mine.major_tick_line_color = mine.minor_tick_line_color = mine.axis_line_color = null;
    var places = Object.keys(settings.ticks), every = Math.ceil(places.length * 42 / width) || 1;
    places = places.filter(function (place, i) { return i % every === 0; });
    if (places.length) {
      mine.ticker = new Bokeh.FixedTicker({ ticks: places.map(Number) });
      mine.major_label_overrides = new Map(places.map(function (place) { return [+place, settings.ticks[place]]; }));
    } else if (settings.whole && settings.scale === "linear") {
      mine.ticker = new Bokeh.BasicTicker({ min_interval: 1 });
    }
    if (settings.scale === "linear") { mine.formatter.power_limit_high = 7; }
    if (settings.percent) { mine.formatter = new Bokeh.NumeralTickFormatter({ format: "0.[0]%" }); }
  }

  function chart(box, data) {
    var soft = getComputedStyle(document.documentElement).getPropertyValue("--soft").trim();
    var line = getComputedStyle(document.documentElement).getPropertyValue("--line").trim();
    var plot = Bokeh.Plotting.figure({
      sizing_mode: "stretch_both", tools: "box_zoom,wheel_zoom,pan,reset", toolbar_location: "above", min_border: 5,
      x_axis_type: data.x.scale, y_axis_type: data.y.scale, active_drag: null,
      x_range: new Bokeh.Range1d({ start: data.x.range[0], end: data.x.range[1] }),
      y_range: new Bokeh.Range1d({ start: data.y.range[0], end: data.y.range[1] }),
      background_fill_color: null, border_fill_color: null, outline_line_color: null,
    });
    plot.toolbar.logo = null;
    plot.toolbar.autohide = mouse;
    plot.toolbar.stylesheets = [":host { --button-color: " + line + "; }"];
    plot.xgrids.concat(plot.ygrids).forEach(function (grid) { grid.grid_line_color = line; });
    plot.xgrids[0].visible = data.x.grid;
    plot.ygrids[0].visible = data.y.grid;
    axis(plot.xaxes[0], data.x, soft, box.clientWidth);
    axis(plot.yaxes[0], data.y, soft, Infinity);
    plot.xaxes[0].axis_line_color = soft;

    // What the pointer shows: the label, the value, and where it is, as the ticks of that axis name it.
    function columns(mark, at, shown, along) {
      var settings = data[along], what = settings.label.split(/,| \(/)[0], other = data[along === "x" ? "y" : "x"];
      return {
        label: at.map(function () { return mark.label || other.label || ""; }), shown: shown,
        at: at.map(function (place) {
          var name = settings.ticks[String(place)];
          return what + " " + (name === undefined ? +place.toPrecision(6) : name.split("\n")[0]);
        }),
      };
    }
    var sides = box.clientWidth < 500 ? ["above", "below"] : ["right", "above", "below", "left"];
    function hover(renderer, mode, text, formatters) {
      sides.push(sides.shift());  // curves that are near each other say their values apart
      plot.add_tools(new Bokeh.HoverTool({
        renderers: [renderer], mode: mode, tooltips: text, formatters: formatters, visible: false, toggleable: false,
        line_policy: "nearest", attachment: sides[0],
      }));
    }
    function values(renderer, mode) {
      hover(renderer, mode, "@label <b>@shown" + digits + "</b><br>@at", { "@shown": "printf" });
    }

    var draw = {
      line: function (mark) {
        var data = Object.assign({ x: mark.x, y: mark.y }, columns(mark, mark.x, mark.y, "x")), drawn = null;
        var source = new Bokeh.ColumnDataSource({ data: data }), x = { field: "x" }, y = { field: "y" };
        var look = { source: source, color: mark.color, alpha: mark.alpha, line_width: mark.width };
        if (mark.dashed) { look.line_dash = [6, 4]; }
        if (mark.steps) { drawn = plot.step(x, y, "before", look); }
        else if (mark.width) { drawn = plot.line(x, y, look); }
        if (mark.marker) {
          var dots = { source: source, marker: mark.marker, size: Math.max(mark.size, 5), color: mark.color };
          var points = plot.scatter(x, y, Object.assign({ alpha: mark.alpha }, dots));
          drawn = drawn || points;
        }
        if (mark.alpha >= 0.5) { values(drawn, "vline"); }  // paler lines are the seeds behind a mean
      },
      dots: function (mark) {
        var source = new Bokeh.ColumnDataSource({
          data: Object.assign({ x: mark.x, y: mark.y }, columns(mark, mark.y.map(Math.round), mark.x, "y")),
        });
        values(plot.scatter({ field: "x" }, { field: "y" }, {
          source: source, size: 7, line_color: mark.color, fill_color: mark.hollow ? null : mark.color, alpha: mark.alpha,
        }), "mouse");
      },
      area: function (mark) {
        plot.patch(mark.x, mark.y, { fill_color: mark.color, fill_alpha: mark.alpha, line_color: null });
      },
      segment: function (mark) { plot.line(mark.x, mark.y, { color: mark.color, alpha: mark.alpha, line_width: 2 }); },
      span: function (mark) {
        plot.add_layout(new Bokeh.Span({
          location: mark.at, dimension: mark.dimension, line_color: mark.color, line_alpha: mark.alpha, line_dash: [5, 4],
        }));
      },
      block: function (mark) {
        var sides = { left: mark.left, right: mark.right, bottom: mark.bottom, top: mark.top };
        var source = new Bokeh.ColumnDataSource({
          data: Object.assign({}, sides, columns(mark, mark.at, mark.shown, mark.along)),
        });
        values(plot.quad({ field: "left" }, { field: "right" }, { field: "bottom" }, { field: "top" }, {
          source: source, fill_color: mark.color, fill_alpha: mark.alpha, line_color: null,
        }), mark.along === "x" ? "vline" : "hline");
      },
      image: function (mark) {
        var mapper = new Bokeh.LinearColorMapper({
          palette: mark.palette, low: mark.limits[0], high: mark.limits[1], nan_color: "rgba(128, 128, 128, 0.2)",
        });
        // A quad for each cell: of an image, BokehJS's public interface cannot make the data.
        var width = (mark.x[1] - mark.x[0]) / mark.rows[0].length, height = (mark.y[1] - mark.y[0]) / mark.rows.length;
        var cells = { left: [], right: [], bottom: [], top: [], value: [] };
        mark.rows.forEach(function (row, i) {
          row.forEach(function (value, j) {
            cells.left.push(mark.x[0] + j * width);
            cells.right.push(mark.x[0] + (j + 1) * width);
            cells.bottom.push(mark.y[0] + i * height);
            cells.top.push(mark.y[0] + (i + 1) * height);
            cells.value.push(value === null ? NaN : value);
          });
        });
        var color = { field: "value", transform: mapper };
        var renderer = plot.quad({ field: "left" }, { field: "right" }, { field: "bottom" }, { field: "top" }, {
          source: new Bokeh.ColumnDataSource({ data: cells }), fill_color: color, line_color: color,
        });
        var bar = { color_mapper: mapper, width: 10, padding: 4, background_fill_color: null, bar_line_color: null,
          major_label_text_color: soft, major_tick_line_color: null };
        if (mark.percent) { bar.formatter = new Bokeh.NumeralTickFormatter({ format: "0.[0]%" }); }
        plot.add_layout(new Bokeh.ColorBar(bar), "right");
        hover(renderer, "mouse", data.x.label + " $x{0}, " + data.y.label.split(" (")[0] + " $y{0}<br><b>@value" + digits + "</b>",
          { "@value": "printf" });
      },
      text: function (mark) {
        plot.add_layout(new Bokeh.Label({
          x: mark.x, y: mark.y, x_offset: mark.shift[0], y_offset: mark.shift[1], text: mark.text, text_color: mark.color,
          text_align: mark.align, text_font_size: "12px",
        }));
      },
    };
    data.marks.forEach(function (mark) { draw[mark.kind](mark); });
    box.replaceChildren();
    Bokeh.Plotting.show(plot, box).then(function () {
      // Dragging zooms with a mouse; a finger scrolls the page, and zooms once the tool was chosen.
      plot.toolbar.tools.forEach(function (tool) { if (tool.type === "BoxZoomTool") { tool.active = mouse; } });
    });
  }

  function all() {
    var style = getComputedStyle(document.documentElement);
    function shown(colour, digits) { return style.getPropertyValue("--plot-" + digits).trim() || colour; }
    boxes.forEach(function (box, i) { chart(box, JSON.parse(texts[i].replace(/#([0-9a-f]{6})/g, shown))); });
  }
  if (boxes.length) {
    Bokeh.set_log_level("error");
    all();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  }
}());
